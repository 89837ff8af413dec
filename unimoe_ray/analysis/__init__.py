"""What a finished model's connectors and experts do: ``unimoe analyse RUN``."""
