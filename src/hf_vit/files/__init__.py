"""Bytes on disk: safe reading and atomic writing of weight files. Knows no model."""
