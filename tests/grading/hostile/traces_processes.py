# Attaches to a process as a debugger does.
# defence: calls
import ctypes
import os
import signal
import time

child = os.fork()
if child == 0:
    time.sleep(20)
    os._exit(0)
libc = ctypes.CDLL(None)
HARM = libc.ptrace(16, child, 0, 0) == 0
os.kill(child, signal.SIGKILL)
