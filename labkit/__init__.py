"""What the book's notebooks share and a reader would skip.

`labkit.models` loads the real models, `labkit.timing` measures, `labkit.hardware` says what the machine can do at best,
`labkit.claims` checks what an answer says.
"""
