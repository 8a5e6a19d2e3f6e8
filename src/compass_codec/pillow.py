"""The .cmps format for Pillow; importing this module registers it.

>>> import compass_codec.pillow
>>> with Image.open("photo.cmps") as image:
...     image.thumbnail((160, 160))
"""

from __future__ import annotations

import io
import os
from typing import IO, TYPE_CHECKING, Any

from PIL import Image, ImageFile

from compass_codec import DEFAULT_QUALITY, container
from compass_codec.errors import CompassError, PictureError

if TYPE_CHECKING:
    from PIL._imaging import PixelAccess

SCALES = (1.0, 2.0, 4.0)


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(container.MAGIC)


class CompassImageFile(ImageFile.ImageFile):
    """A .cmps file. Its frames are the layers, smallest first, of which one at a time is decoded when it is loaded.

    ``n_frames`` counts the layers that the file holds whole. Unlike other formats it opens at the last of them, the
    largest picture. Opening reads the header alone; ``load`` reads and decodes what the layer needs, and raises
    OSError if that is damaged, cut off or made with weights that are not found.
    """

    format = "CMPS"
    format_description = "COMPASS layered image"

    def _open(self) -> None:
        assert self.fp is not None
        try:
            # Pillow has its own limit on pixels
            self._header = container.read_header(self.fp.read(container.MAX_HEADER), max_pixels=container.MAX_SIDE**2)
        except CompassError as e:
            raise SyntaxError(str(e)) from e
        self._fp = self.fp
        size = self.fp.seek(0, os.SEEK_END)
        self.n_frames = max(1, sum(entry.end <= size for entry in self._header.layers))
        self.is_animated = self.n_frames > 1
        self.info["scales"] = [entry.scale for entry in self._header.layers]
        self.info["layers"] = len(self._header.layers)
        self._read_metadata()
        self._show(self.n_frames - 1)

    def _read_metadata(self) -> None:
        """ICC profile, EXIF and XMP; what is damaged or not there any more is left out."""
        layers = self._header.layers
        before = self._read(0, layers[0].start)
        behind = self._read(layers[-1].end, self._header.end)
        found = container.sections(self._header, before, (), behind, best_effort=True)
        if found.icc:
            self.info["icc_profile"] = found.icc
        if found.exif:
            self.info["exif"] = b"Exif\0\0" + found.exif
        if found.xmp:
            self.info["xmp"] = found.xmp

    def _show(self, frame: int) -> None:
        """Make ``frame`` the one that will be loaded."""
        entry = self._header.layers[frame]
        self._frame, self._size, self._im = frame, (entry.width, entry.height), None
        self._mode = "RGBA" if self._header.has_alpha(frame) else "RGB"
        self.info["quality"] = entry.quality
        self.tile = [ImageFile._Tile("raw", (0, 0, *self.size), 0, self.mode)]

    def tell(self) -> int:
        """The layer that is, or will be, loaded."""
        return self._frame

    def seek(self, frame: int) -> None:
        """Go to layer ``frame``; EOFError if the file does not hold it whole."""
        if self._seek_check(frame):
            self._show(frame)

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> tuple[str, tuple[int, int, float, float]] | None:
        """Before loading: go to the smallest layer that is at least as large as ``size`` both ways, and no layer above
        the present one. The mode stays as it is. Returns (mode, box), the box being all of that layer, or None after
        loading."""
        if not self.tile or size is None:
            return None
        sides = [(entry.width, entry.height) for entry in self._header.layers[: self._frame]]
        self.seek(next((k for k, (w, h) in enumerate(sides) if w >= size[0] and h >= size[1]), self._frame))
        return self.mode, (0, 0, *self.size)

    def load(self) -> PixelAccess | None:
        """Decode the present layer. Raises OSError."""
        if self.tile:
            picture = self._decode()
            if self._exclusive_fp and not self.is_animated:
                self._fp.close()
            self.fp = io.BytesIO(picture)
        return super().load()

    def _decode(self) -> bytes:
        from compass_codec import codec

        try:
            data = self._read(0, self._header.layers[self._frame].end)
            return codec.shared(model=self._header.model).decode(data, self._frame, container.MAX_SIDE**2).tobytes()
        except CompassError as e:
            raise OSError(str(e)) from e

    def _read(self, start: int, end: int) -> bytes:
        self._fp.seek(start)
        return self._fp.read(end - start)

    def load_seek(self, pos: int) -> None:
        """Nothing to seek: ``load`` hands over the decoded picture."""

    def verify(self) -> None:
        """Compare the layers' checksums. Raises OSError for a damaged or incomplete file; as with other formats, the
        file must be opened again after that."""
        if self.fp is not None:
            states = container.states(self._header, self._read(0, self._header.end))
            names = [f"layer {k}" for k in range(len(self._header.layers))]
            names += [section.name for section in self._header.sections]
            for name, state in zip(names, states, strict=True):
                if state != "ok":
                    raise OSError(f"{name} is {state}")
        super().verify()


def _save(im: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    """``scales``: 1 to 16 factors that do not fall (default 1, 2, 4); ``quality``: 1..100 (default 60), one for all
    layers or one for each; ``model``: a profile of weights, or
    ``tune``: "psnr" or "visual"; ``icc_profile`` (default: the picture's own; one for grey
    or CMYK is applied), ``exif`` (the picture is turned as its orientation says) and ``xmp``. Alpha is kept."""
    from compass_codec import codec, pictures, weights

    options: dict[str, Any] = im.encoderinfo
    for name in ("icc_profile", "exif", "xmp"):
        if not isinstance(options.get(name), bytes | Image.Exif | None):
            raise TypeError(f"{name} is bytes, not {type(options[name]).__name__}")
    scales = container.check_scales(options.get("scales", SCALES))
    exif = options.get("exif")
    picture = im.copy()
    told = {
        "icc_profile": options.get("icc_profile", im.info.get("icc_profile")),
        "exif": exif.tobytes() if isinstance(exif, Image.Exif) else exif,
        "xmp": options.get("xmp"),
        "transparency": im.info.get("transparency"),
    }
    picture.info = {key: value for key, value in told.items() if value is not None}
    try:
        source = pictures.from_image(picture)
        layers, alphas = pictures.pyramid_alpha(source, codec.layer_sizes(source.image.size, scales))
    except PictureError as e:
        raise OSError(f"cannot write mode {im.mode} as CMPS ({e})") from e
    alpha = {k: pictures.alpha_to_bytes(plane) for k, plane in enumerate(alphas)}
    sections = container.Sections(source.icc, source.exif, source.xmp, alpha)
    chosen = codec.shared(model=weights.tuned(options.get("tune"), options.get("model")))
    quality = options.get("quality", DEFAULT_QUALITY)
    fp.write(chosen.encode_layers(layers, scales, quality, sections=sections).data)


Image.register_open(CompassImageFile.format, CompassImageFile, _accept)
Image.register_save(CompassImageFile.format, _save)
Image.register_extension(CompassImageFile.format, ".cmps")
Image.register_mime(CompassImageFile.format, "image/x-cmps")
