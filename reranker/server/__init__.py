"""gunicorn and uvicorn: connections, signals, several workers."""
