"""The sweep file, its cells, and which of them are the same run."""
