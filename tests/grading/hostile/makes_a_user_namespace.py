# Makes a user namespace, in which it would have every capability.
# defence: calls
import ctypes

HARM = ctypes.CDLL(None).unshare(0x10000000) == 0
