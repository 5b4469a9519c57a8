"""Images in, batches out: the bundled digits and photographs, folders of images, and codes on disk."""

from .codes import EncodedImages, read_codes, write_codes
from .datasets import DataConfig, DigitImages, FolderImages, ImageDataset, PhotoCrops, Split, open_dataset
from .grid import image_grid, save_image, to_uint8
from .pictures import read_image
from .stream import Batch, BatchStream, TensorItems

__all__ = [
    "Batch",
    "BatchStream",
    "DataConfig",
    "DigitImages",
    "EncodedImages",
    "FolderImages",
    "ImageDataset",
    "PhotoCrops",
    "Split",
    "TensorItems",
    "image_grid",
    "open_dataset",
    "read_codes",
    "read_image",
    "save_image",
    "to_uint8",
    "write_codes",
]
