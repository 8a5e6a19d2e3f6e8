"""What can go wrong with data; every error is a ValueError whose message is one line for a person."""


def one_line(text: object) -> str:
    """A message as one line, whatever the library that wrote it broke it into."""
    lines = str(text).splitlines()
    return str(text) if len(lines) == 1 else " ".join(line.strip() for line in lines if line.strip())


def told(error: BaseException) -> str:
    """An error as one line; one of the operating system begins with the file's name and has no number."""
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return one_line(f"{name}{error.strerror or error}")
    return one_line(error)


class CompassError(ValueError):
    """Base of all errors of this package."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class FormatError(CompassError):
    """Not a .cmps file, or one whose header breaks the rules of the format."""


class TruncatedError(CompassError):
    """The file ends before the layer that was asked for."""


class DamagedError(CompassError):
    """The bytes are not those that were written: a checksum does not match, or what they say is impossible."""


class WeightsError(CompassError):
    """The weights that a file was made with or a name stands for are not here, or cannot be used."""


class LayerError(CompassError):
    """A layer that the file does not have."""


class LimitError(CompassError):
    """More pixels, layers or bytes than allowed."""


class PictureError(CompassError):
    """A picture that cannot be read, written or coded."""


class OptionError(CompassError):
    """An option or argument that cannot be used."""


class RemoteError(CompassError):
    """A file on a web server that cannot be fetched."""


class MeasureError(CompassError):
    """A measure of pictures that cannot be taken: what it needs is not here, or failed."""
