# Forks until it cannot.
# defence: processes
import os
import signal

children = []
try:
    while len(children) < 120:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        children.append(child)
except OSError:
    pass
HARM = len(children) >= 120
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
