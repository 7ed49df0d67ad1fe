# Calls home: connects to a program that listens on the instructor's machine.
# defence: network
import socket

try:
    socket.create_connection(("127.0.0.1", int("@PORT@")), timeout=2).close()
    HARM = True
except OSError:
    HARM = False
