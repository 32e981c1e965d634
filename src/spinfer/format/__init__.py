"""TCA-BME: tile geometry (`layout`), encode and decode (`codec`), the tensor (`tensor`)."""

from spinfer.format.layout import FORMAT_VERSION, Geometry
from spinfer.format.tensor import TcaBmeTensor, encode

__all__ = ["FORMAT_VERSION", "Geometry", "TcaBmeTensor", "encode"]
