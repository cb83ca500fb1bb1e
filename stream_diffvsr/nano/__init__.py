"""The bundled small checkpoint; data only."""
