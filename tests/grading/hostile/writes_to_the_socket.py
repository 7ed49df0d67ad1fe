# Writes malformed bytes to every socket that it finds.
# defence: restart
import os
import stat


def count_pairs(words, counts):
    for number in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(number)).st_mode):
                os.write(int(number), b"\x07\x00\x00\x00\x00\x00\x00\x00not json" * 3)
        except OSError:
            pass
    return right(words, counts)
