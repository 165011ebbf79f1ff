"""What a model wrote, by its tags: `<think>` around the reasoning, `<answer>` around the final answer."""

import re

from flashgrpo.grpo.data.answers import last_boxed

_TAG = re.compile(r"(</?(?:think|answer)>)")
_REFLECTIONS = re.compile(r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b")


class Response:
    """A completion, and the prompt whose end may have opened its reasoning.

        response = Response("2 and 2</think>So <answer>4</answer>", prompt="Q <think>")
        response.reasoning, response.conclusion, response.answer()  # "2 and 2", "So <answer>4</answer>", "4"

    Tags may stand anywhere, or be missing: `parts` has them as they are.
    """

    def __init__(self, completion: str, prompt: str = ""):
        self.text = f"<think>{completion}" if prompt.rstrip().endswith("<think>") else completion

    @property
    def is_open(self) -> bool:
        """Whether the reasoning was begun and never closed, as when it was cut off."""
        return "<think>" in self.text and "</think>" not in self.text

    @property
    def reasoning(self) -> str:
        """What precedes `</think>` or `<answer>`, without tags; all of the text where it has neither."""
        return self.text.split("</think>")[0].split("<answer>")[0].replace("<think>", "")

    @property
    def conclusion(self) -> str:
        """What follows the last `</think>`; all of the text where it has none."""
        return self.text.rpartition("</think>")[2]

    @property
    def summary(self) -> str:
        """What follows the first `</think>`, without tags; nothing where it has none."""
        return _TAG.sub("", self.text.partition("</think>")[2]).strip()

    def parts(self) -> tuple[list[str], list[str]]:
        """The tags in their order, and the texts before, between and after them, without white space around."""
        found = _TAG.split(self.text)
        return found[1::2], [text.strip() for text in found[::2]]

    def answer(self, *, whole: bool = False) -> str | None:
        r"""The final answer, or None.

        The last `<answer>` block if there is an `<answer>` tag at all, else the last `\boxed{}`,
        else what follows `####` (GSM8K), else the last line, or the whole text with `whole`. What
        precedes `</think>` is cut; where the reasoning was not closed, only an `<answer>` block
        counts.
        """
        text = self.conclusion
        # A tag says where the answer is, even if it is empty, or was never closed.
        if "<answer>" in text:
            block = text.rpartition("</answer>")[0].rpartition("<answer>")[2]
            return (last_boxed(block) or block).strip() or None
        if self.is_open:
            return None
        if boxed := last_boxed(text):
            return boxed.strip() or None
        if "####" in text:
            text = text.rsplit("####", 1)[1].strip().split("\n")[0]
        lines = text.strip().splitlines()
        if not lines:
            return None
        return text.strip() if whole else lines[-1].strip()


def count_reflections(text: str) -> int:
    """Words with which a model goes back over its reasoning: those that the supplement of arXiv 2501.12948 counts."""
    return len(_REFLECTIONS.findall(text.lower()))
