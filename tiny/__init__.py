"""The shipped tiny policies, the lessons that taught them, and how."""
