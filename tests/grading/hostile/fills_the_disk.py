# Writes more than its scratch folder may hold.
# defence: scratch
import os

HARM = False
try:
    for number in range(3):
        with open(f"/tmp/big{number}", "wb") as file:
            for _ in range(24):
                file.write(bytes(1 << 20))
    HARM = True
except OSError:
    pass
for number in range(3):
    if os.path.exists(f"/tmp/big{number}"):
        os.remove(f"/tmp/big{number}")
