"""Container runtimes behind one small base, a file each."""
