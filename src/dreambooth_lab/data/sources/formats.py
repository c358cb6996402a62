"""Which files count as pictures: by name, or by their first bytes where the name doesn't say; which folders are passed over."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import PurePosixPath

from PIL import features

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff"}
OTHER_PICTURES = {".gif", ".jp2", ".psd", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".tga"}
HEIC, JXL, AVIF = {".heic", ".heif", ".hif"}, {".jxl"}, {".avif", ".avifs"}
DECODERS = {**dict.fromkeys(HEIC, ("pillow_heif", "heic")), **dict.fromkeys(JXL, ("pillow_jxl", "jxl"))}  # package, our extra
NOT_PICTURES = {  # what lies beside photos, and is never looked into
    ".txt", ".caption", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".md", ".parquet", ".npz", ".npy", ".pt", ".py",
    ".safetensors", ".html", ".xml", ".xmp", ".aae", ".db", ".ini", ".log", ".zip", ".tar", ".gz", ".mp4", ".mov", ".pdf",
}  # fmt: skip
SYSTEM_FILES = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "system volume information", "thumbs.db"}
MAGIC = (  # (offset, bytes, suffix)
    (0, b"\xff\xd8\xff", ".jpg"), (0, b"\x89PNG\r\n\x1a\n", ".png"), (8, b"WEBP", ".webp"), (0, b"II*\0", ".tif"),
    (0, b"MM\0*", ".tif"), (0, b"GIF8", ".gif"), (4, b"ftypavif", ".avif"), (4, b"ftypheic", ".heic"), (4, b"ftypheix", ".heic"),
    (4, b"ftypmif1", ".heic"), (0, b"\xff\x0a", ".jxl"), (4, b"JXL \r\n\x87\n", ".jxl"),
)  # fmt: skip
SNIFFED = 16  # bytes that tell a kind


def hidden(name: str) -> bool:
    """Whether a file's or folder's own name marks it as an operating system's or a program's: trash, thumbnails, forks."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


@cache
def decoder(package: str) -> bool:
    """Whether a package that teaches Pillow a format is here; it is taken up then."""
    if not find_spec(package):
        return False
    if package == "pillow_heif":
        import pillow_heif

        pillow_heif.register_heif_opener()
    else:
        import pillow_jxl  # noqa: F401  (importing it is what teaches Pillow)
    return True


def name_status(name: str) -> str | None:
    """What a file's name says: "" it is a picture, why it is one that can't be read, None if it is none or doesn't say."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in SUFFIXES or (suffix in AVIF and features.check("avif")):
        return ""
    if suffix in AVIF:
        return "this Pillow reads no AVIF; pip install -U pillow, or convert it to PNG or JPEG"
    if suffix in DECODERS:
        package, extra = DECODERS[suffix]
        way_out = f"pip install 'dreambooth-lab[{extra}]', or convert it to PNG or JPEG"
        return "" if decoder(package) else f"{suffix} files need {package.replace('_', '-')}; {way_out}"
    return f"{suffix} files can't be read here; convert it to PNG or JPEG" if suffix in OTHER_PICTURES else None


def unsupported_suffix(name: str) -> bool:
    """Whether a name leaves open what the file is, so that its first bytes must tell."""
    suffix = PurePosixPath(name).suffix.lower()
    return name_status(name) is None and suffix not in NOT_PICTURES


def sniff(start: bytes) -> str | None:
    """`name_status` by the first `SNIFFED` bytes."""
    kind = next((suffix for at, mark, suffix in MAGIC if start[at:].startswith(mark)), None)
    return name_status(f"picture{kind}") if kind else None
