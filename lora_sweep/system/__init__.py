"""What the operating system gives and takes: files, room, memory, time, signals, the terminal."""
