# Gives itself points in a gradebook that everybody may write.
# defence: files
import sqlite3

try:
    with sqlite3.connect("@COURSE@/grading/gradebook.db") as book:
        book.execute("update grade set points = points")
    HARM = True
except sqlite3.Error:
    HARM = False
