"""The bundled model: its files, and the text that it was never trained on."""
