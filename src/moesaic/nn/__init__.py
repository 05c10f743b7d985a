"""Small parts every Transformer needs, one idea a file. They know nothing of experts or routing."""
