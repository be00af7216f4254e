"""PEFT adapters: folders on disk, anyone's, and PEFT on a base's skeleton."""
