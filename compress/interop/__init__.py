"""Other tools' layouts, read and written; what runtimes can load; the Hub."""
