"""Images in, batches out: the bundled digits and photographs, folders of images, and codes on disk."""

from .codes import EncodedImages, read_codes, write_codes
from .datasets import ImageDataset, Split
from .grid import image_grid, save_image, to_uint8
from .pictures import read_image
from .settings import DataConfig, open_dataset
from .sources.digits import DigitImages
from .sources.folder import FolderImages
from .sources.photos import PhotoCrops
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
