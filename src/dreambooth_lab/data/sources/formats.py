"""Which files are images: by name, or by their first bytes if the name is ambiguous; which folders are skipped."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import PurePosixPath

from PIL import features

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff"}
OTHER_PICTURES = {".gif", ".jp2", ".psd", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".tga"}
HEIC, JXL, AVIF = {".heic", ".heif", ".hif"}, {".jxl"}, {".avif", ".avifs"}
DECODERS = {**dict.fromkeys(HEIC, ("pillow_heif", "heic")), **dict.fromkeys(JXL, ("pillow_jxl", "jxl"))}  # package, our extra
NOT_PICTURES = {  # files that are common beside photos, and are never opened
    ".txt", ".caption", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".md", ".parquet", ".npz", ".npy", ".pt", ".py",
    ".safetensors", ".html", ".xml", ".xmp", ".aae", ".db", ".ini", ".log", ".zip", ".tar", ".gz", ".mp4", ".mov", ".pdf",
}  # fmt: skip
SYSTEM_FILES = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "system volume information", "thumbs.db"}
MAGIC = (  # (offset, bytes, suffix)
    (0, b"\xff\xd8\xff", ".jpg"), (0, b"\x89PNG\r\n\x1a\n", ".png"), (8, b"WEBP", ".webp"), (0, b"II*\0", ".tif"),
    (0, b"MM\0*", ".tif"), (0, b"GIF8", ".gif"), (4, b"ftypavif", ".avif"), (4, b"ftypheic", ".heic"), (4, b"ftypheix", ".heic"),
    (4, b"ftypmif1", ".heic"), (0, b"\xff\x0a", ".jxl"), (4, b"JXL \r\n\x87\n", ".jxl"),
)  # fmt: skip
SNIFFED = 16  # bytes that identify a format


def hidden(name: str) -> bool:
    """Whether a name belongs to a file or folder of the operating system or a program: trash, thumbnails, forks."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


@cache
def decoder(package: str) -> bool:
    """Whether a package that adds a format to Pillow is installed; it is then registered."""
    if not find_spec(package):
        return False
    if package == "pillow_heif":
        import pillow_heif

        pillow_heif.register_heif_opener()
    else:
        import pillow_jxl  # noqa: F401  (importing registers it)
    return True


def name_status(name: str) -> str | None:
    """The status by a file's name: "" for an image, a reason for an unreadable image, None if it is no image or ambiguous."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in SUFFIXES or (suffix in AVIF and features.check("avif")):
        return ""
    if suffix in AVIF:
        return "this version of Pillow can't read AVIF; pip install -U pillow, or convert it to PNG or JPEG"
    if suffix in DECODERS:
        package, extra = DECODERS[suffix]
        way_out = f"pip install 'dreambooth-lab[{extra}]', or convert it to PNG or JPEG"
        return "" if decoder(package) else f"{suffix} files need {package.replace('_', '-')}; {way_out}"
    return f"{suffix} files can't be read here; convert it to PNG or JPEG" if suffix in OTHER_PICTURES else None


def unsupported_suffix(name: str) -> bool:
    """Whether the format can't be decided by name, so that the first bytes must be read."""
    suffix = PurePosixPath(name).suffix.lower()
    return name_status(name) is None and suffix not in NOT_PICTURES


def sniff(start: bytes) -> str | None:
    """`name_status` by the first `SNIFFED` bytes."""
    kind = next((suffix for at, mark, suffix in MAGIC if start[at:].startswith(mark)), None)
    return name_status(f"picture{kind}") if kind else None
