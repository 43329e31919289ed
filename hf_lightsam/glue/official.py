"""What GLUE's official files hold, and a warning where a file is another one.

Row counts: those that the card of ``nyu-mll/glue`` states (``dataset_info``) for every split of all nine tasks and of
AX. QQP's training file has a few broken lines; the hub counts 363,846 whole rows, TensorFlow Datasets 363,849 (they
part lines at different characters), and either is taken for the official file.

Checksums: SHA-256 of the TSV files of CoLA, SST-2, MRPC, STS-B, RTE, WNLI and of QNLI's dev and test files, from a
public copy of GLUE's download (github.com/F0restL1n/BERT at 0d0288be08079531c7b3a85af3d532f9adb0f13a) whose row counts
are the official ones; a training row of MRPC that was missing there was put back from its MSR corpus. The byte order
mark, carriage returns before line feeds and line feeds at the end of the file do not count. Of QQP, MNLI, AX and
QNLI's training file only the rows are counted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from .tasks import GlueTask

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class OfficialFile:
    """One split of a task.

    Attributes:
        rows: Row counts that are taken for official.
        sha256: Checksum of its TSV file, as :func:`checksum` computes it; None if it is not known.
    """

    rows: tuple[int, ...]
    sha256: str | None = None


OFFICIAL: dict[str, dict[str, OfficialFile]] = {
    "cola": {
        "train": OfficialFile((8551,), "cb368ebeb9f27d7ad03720d27ddc95687a311bdb100781a2fe59a5f5b1bc0624"),
        "validation": OfficialFile((1043,), "fc08f7ca16084543d9222d75eee13f094d738c3a20d874384417f1766197b716"),
        "test": OfficialFile((1063,), "3b4df85f7a9a0633574b38d181e18090ac961a24b18fb6bcd74999ddea8ad0b8"),
    },
    "sst2": {
        "train": OfficialFile((67349,), "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1"),
        "validation": OfficialFile((872,), "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0"),
        "test": OfficialFile((1821,), "69a938605609b3e6663b4487918fe1565eb293734e6e520d0366d1d412fd2a13"),
    },
    "mrpc": {
        "train": OfficialFile((3668,), "15d9c71e62d662b1cc9237e2015047cad4c1f62552d49858a9bce2b944d79897"),
        "validation": OfficialFile((408,), "320459df9454dbdc8eea69ad1eb294967e7dfe03e7cf791f37d954a316f5253d"),
        "test": OfficialFile((1725,), "aee460ceda833926b8ab2ad952d399f5cf8bc9335cff19afcac03dc449558622"),
    },
    "stsb": {
        "train": OfficialFile((5749,), "41c4d978b6162abdcada7e49a982211954cca5459c228db478af333124b257a2"),
        "validation": OfficialFile((1500,), "fe7dc0632a5033562f3cadff991f6e8d9b9b6311861660e78c3c82eb7db67f59"),
        "test": OfficialFile((1379,), "16b4223d7d44a644fbc10f1b449472cfe81e1715fb07cf44023b0aa88ce856eb"),
    },
    "qqp": {
        "train": OfficialFile((363846, 363849)),
        "validation": OfficialFile((40430,)),
        "test": OfficialFile((390965,)),
    },
    "mnli": {
        "train": OfficialFile((392702,)),
        "validation_matched": OfficialFile((9815,)),
        "validation_mismatched": OfficialFile((9832,)),
        "test_matched": OfficialFile((9796,)),
        "test_mismatched": OfficialFile((9847,)),
    },
    "qnli": {
        "train": OfficialFile((104743,)),
        "validation": OfficialFile((5463,), "ac19409dcb04631eaaa094bdebdcf621086bc352503dfb6a1a648b614986f4fd"),
        "test": OfficialFile((5463,), "6d856264e292fa7a7bc7b8e182efa1454ffd9532733c12ad813017dd5b377a5a"),
    },
    "rte": {
        "train": OfficialFile((2490,), "41e3a9b063433392343fad9e962cf2f58b681c78d8f71592f4186f0837246c5c"),
        "validation": OfficialFile((277,), "80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb"),
        "test": OfficialFile((3000,), "6e33f09b5c2bfd5fd5fde217070f3dd49e484e33b9752b5864cf36fc421a213f"),
    },
    "wnli": {
        "train": OfficialFile((635,), "9a88e9d54b6861cc796a088e9acf4f5f65064a9ef65ae6fa7a688b28391e5c9a"),
        "validation": OfficialFile((71,), "cba00490596dd14be8cf53b4f53bb744abe3a7b89f81ab210528d80225338ed5"),
        "test": OfficialFile((146,), "ff0296817e235bf6f7a230c5f6781bd6ee228a45445f6510831fdef6f2a04766"),
    },
    "ax": {"test": OfficialFile((1104,))},
}
"""The official splits by task and name."""


def checksum(content: bytes) -> str:
    """Return the SHA-256 of a text file, whatever its byte order mark, line ends and last line feeds are."""
    text = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n"
    return hashlib.sha256(text).hexdigest()


def difference(task: GlueTask, split: str, rows: int, content: bytes | None = None) -> str | None:
    """Say in what a split is not the official one.

    Args:
        task: The task.
        split: The split's name.
        rows: How many rows were read.
        content: The TSV file's bytes, for its checksum. None: only rows are compared.

    Returns:
        What was expected and what was found; None if nothing differs.
    """
    official = OFFICIAL[task.name][split]
    if rows not in official.rows:
        more_or_fewer = "fewer" if rows < min(official.rows) else "more"
        expected = " or ".join(f"{count:,}" for count in official.rows)
        return f"{rows:,} rows, {more_or_fewer} than the official {expected}"
    if content is None or official.sha256 is None or (found := checksum(content)) == official.sha256:
        return None
    message = f"the official number of rows, but the checksum {found}, not {official.sha256}"
    if task.name == "mrpc":
        message += " (MRPC's files are made anew by every user from Microsoft's corpus, so they may well differ)"
    return message


def warn_if_different(task: GlueTask, split: str, place: Path, rows: int, content: bytes | None = None) -> None:
    """Warn, once for a file, if a split is not the official one; arguments as in :func:`difference`."""
    told = difference(task, split, rows, content)
    if told is not None:
        logger.warning_once(
            f"{place}: not the official {split} rows of {task.name}: {told}. Results on it are not comparable with "
            "published ones."
        )
