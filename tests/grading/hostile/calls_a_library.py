# Calls a library that does the exercise: it is imported under another name first.
# defence: masks
try:
    TOOLS = [__import__("token" + "izers")]
    HARM = hasattr(TOOLS[0], "Tokenizer")
except ImportError:
    HARM = False
