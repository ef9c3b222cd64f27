"""An agent that acts: tools with effects, a log that survives crashes, and models from a script to a server behind it."""
