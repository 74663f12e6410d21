"""THE TABLE of students: which of its teacher's layers each one keeps, and how it was published.

Only `TABLE` is written by hand. The rest follows from it: a student's `config.json` and weights (cutting.py), its
feature pairs (pairs.py), its size and cost. `python -m flaxkd.students` prints it for every family.
"""

import difflib

from flaxkd.pretrained.families import FAMILIES, Family
from flaxkd.students.row import ALL, RESNET, Published, Student, first, read

# Kim et al. 2023 (BK-SDM, arXiv:2305.15798) cut Stable Diffusion this way, and so does Segmind's distill-sd.
# An up block keeps its layers 0 and 2. The last layer takes the skip from the outer stage. In blocks 1 and 2
# that skip has another width, and only this layer fits. Layer 1 is the redundant one.
TABLE = (
    #       down block: layers kept                mid    up block: layers kept
    Student({0: (0,), 1: (0,), 2: (0,), 3: (0,)},  True,  {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        "segmind": Published("sd_small", "Segmind SD-Small", "segmind/small-sd"),
        "bksdm":   Published("bk_base",  "BK-SDM-Base",      "nota-ai/bk-sdm-base")}),
    Student({0: (0,), 1: (0,), 2: (0,), 3: (0,)},  False, {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        "bksdm":   Published("bk_small", "BK-SDM-Small",     "nota-ai/bk-sdm-small")}),
    Student({0: (0,), 1: (0,), 2: (0,)          }, False, {           1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        # distill_training.py: the student's innermost block learns all the teacher's inner stage does.
        "segmind": Published("sd_tiny",  "Segmind SD-Tiny",  "segmind/tiny-sd",
                             ("down_blocks.2", "up_blocks.0")),
        # kd_train_text_to_image.py: before the last residual and before the downsampler, absent in the student.
        "bksdm":   Published("bk_tiny",  "BK-SDM-Tiny",      "nota-ai/bk-sdm-tiny",
                             ("down_blocks.2.attentions.0.proj_out",
                              "down_blocks.2.attentions.1.proj_out"))}),

    # SDXL. All publish numbers of layers and transformer blocks alone, and no code of the cut. Where shapes leave a
    # choice, it is the first k transformer blocks, as names that agree would copy them; SSD-1B's are nearly those.
    Student({0: (0, 1), 1: (0, 1), 2: {0: (0, 1, 2, 6), 1: (0, 1, 2, 6)}},     RESNET,
            {0: {0: (0, 1, 2, 6), 1: (0, 1, 2, 6), 2: ALL}, 1: {0: ALL, 1: (0,), 2: (0,)}, 2: (0, 1, 2)}, {
        "segmind_sdxl": Published("ssd_1b", "Segmind SSD-1B", "segmind/SSD-1B")}, ("sdxl",),
        # huggingface.co/furusu/SSD-1B-anime: cosine similarity of SSD-1B's weights with SDXL's.
        "numbers published; which transformer blocks, estimated from its weights by furusu"),
    Student({0: (0, 1), 1: {0: first(1), 1: first(1)}, 2: {0: first(2), 1: first(2)}}, RESNET,
            {0: {0: first(2), 1: first(2), 2: first(2)}, 1: {0: first(1), 1: first(1), 2: first(1)}, 2: (0, 1, 2)}, {
        "segmind_sdxl": Published("vega", "Segmind Vega", "segmind/Segmind-Vega")}, ("sdxl",),
        "numbers published; which transformer blocks, our choice"),
    # Shapes force the layers: an up block needs 0 and 2, as above, and the inner two down blocks layer 0.
    Student({0: {0: ()}, 1: {0: first(2)}, 2: {0: first(6)}},                  first(6),
            {0: {0: first(6), 2: first(6)}, 1: {0: first(2), 2: first(2)}, 2: {0: (), 2: ()}}, {
        "koala": Published("koala_1b", "KOALA-1B", "etri-vilab/koala-1b")}, ("sdxl",),
        "numbers published; which transformer blocks, our choice; layers as only they fit"),
    Student({0: {0: ()}, 1: {0: first(2)}, 2: {0: first(5)}},                  False,
            {0: {0: first(5), 2: first(5)}, 1: {0: first(2), 2: first(2)}, 2: {0: (), 2: ()}}, {
        "koala": Published("koala_700m", "KOALA-700M", "etri-vilab/koala-700m")}, ("sdxl",),
        "numbers published; which transformer blocks, our choice; layers as only they fit"),
    Student({0: (0,), 1: (0,), 2: (0,)},           True,  {0: (0, 2), 1: (0, 2), 2: (0, 2)}, {
        "bksdm": Published("bk_sdxl_base", "BK-SDM-Base's rule")}, ("sdxl",), "our choice: a published rule on SDXL"),
    Student({0: (0,), 1: (0,), 2: (0,)},           False, {0: (0, 2), 1: (0, 2), 2: (0, 2)}, {
        "bksdm": Published("bk_sdxl_small", "BK-SDM-Small's rule")}, ("sdxl",), "our choice: a published rule on SDXL"),
)  # fmt: skip

STUDENTS = {name: student for student in TABLE for name in student.names}

CLASH = "mind that Segmind's SD-Small is sd_small = bk_base (with a mid block), and BK-SDM-Small is bk_small"


def of(family: Family) -> tuple[Student, ...]:
    """The rows that can be cut from a UNet of this family."""
    return tuple(student for student in TABLE if family in map(FAMILIES.get, student.families))


def get(name: str) -> Student:
    """The student of that name, or in that file, FILE.json (see `read`).

    Raises ValueError with close matches for an unknown name; and what `read` raises."""
    if str(name).endswith(".json"):
        return read(name)
    if name not in STUDENTS:
        raise ValueError(unknown("student", name, STUDENTS) + f"; {CLASH}")
    return STUDENTS[name]


def unknown(what: str, name: str, known) -> str:
    """The error message for an unknown name, with close matches among the known ones."""
    close = difflib.get_close_matches(str(name), known, cutoff=0.5)
    hint = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"


def diagram(student: Student | None, family: Family | None = None) -> str:
    """The teacher's blocks in a line: a digit for a kept layer, a dot for a removed one, res for a lone resnet.

    student: None for the teacher itself, of the given family (None: the first of the table)."""
    family = student.family if student else family or TABLE[0].family

    def path(kept, layers):
        keeps = lambda block, i: kept is None or i in kept.get(block, ())
        blocks = range(family.stages)
        return " ".join("".join(str(i) if keeps(b, i) else "." for i in range(layers)) for b in blocks)

    down, mid, up = (student.down, student.mid, student.up) if student else (None, True, None)
    mid = {False: "...", RESNET: "res"}.get(mid, "mid")
    return f"{path(down, family.layers)} | {mid} | {path(up, family.layers + 1)}"
