"""Whether two checkpoints speak in the same tokens, which comparing their distributions needs."""

from transformers import PreTrainedTokenizerBase

from r1pipe.config import OnPolicyDistill
from r1pipe.errors import UserError
from r1pipe.models import find_end_id


def require_same_vocabulary(
    stage: OnPolicyDistill,
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_end_ids: list[int],
    student_end_ids: list[int],
) -> None:
    """Raises UserError, naming the first token that differs, or that ends the teacher's turns and
    no sample of the student's."""
    if difference := find_difference(teacher, student):
        raise UserError(
            f'stage "{stage.name}": teacher {stage.from_} and student {stage.student} have not the '
            f"same vocabulary: {difference}; take a student of the teacher's family, or teach it "
            "off-policy, by a distill stage"
        )
    end = find_end_id(teacher, teacher_end_ids)
    if end not in student_end_ids:
        raise UserError(
            f'stage "{stage.name}": teacher {stage.from_} ends with '
            f"{teacher.convert_ids_to_tokens(end)!r}, at which student {stage.student} does not "
            "stop: add it to eos_token_id in the student's generation_config.json"
        )


def find_difference(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> str | None:
    """The first thing in which the vocabularies differ, in words; None if ids mean the same.

    How text is cut into tokens is not compared: the teacher reads the student's ids. Nor are the
    sizes of the models' embeddings, which are padded as their makers like it.
    """
    theirs, own = teacher.get_vocab(), student.get_vocab()
    for token in sorted({*theirs, *own}, key=lambda t: (theirs.get(t, own.get(t)), t)):
        if theirs.get(token) != own.get(token):
            return (
                f"{token!r} is {name_id(theirs.get(token))} of the teacher's and "
                f"{name_id(own.get(token))} of the student's"
            )
    if teacher.eos_token_id != student.eos_token_id:
        return (
            f"the teacher ends with {teacher.eos_token!r} and the student with "
            f"{student.eos_token!r}"
        )
    return None


def name_id(number: int | None) -> str:
    return "no token" if number is None else f"token {number}"
