"""Many clients trained as one program: parameters [clients, out, in], and every client as if it were alone."""
