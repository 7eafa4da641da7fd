"""Reasons why a conversation can't be used: one constant phrase each, for counting."""

NO_MESSAGES = "no 'messages' or 'conversations' key"
NO_PAIR = "no 'prompt' and 'completion' of one kind"
WRONG_MESSAGES = "messages are not a list of objects"
UNKNOWN_ROLE = "unknown role"
WRONG_CONTENT = "content is not text"
WRONG_ENCODING = "wrong encoding"
EMPTY_TURN = "empty turn"
NO_ASSISTANT = "no assistant turn"
UNANSWERED = "last turn is not the assistant's"
WRONG_CALLS = "malformed tool calls"
BROKEN_ARGUMENTS = "broken JSON in tool arguments"
WRONG_TOOLS = "malformed tools"
WRONG_WEIGHT = "weight is not 0 or 1"
WRONG_KWARGS = "chat_template_kwargs is not an object"
NOTHING_TRAINED = "nothing trained"
TEMPLATE_REFUSED = "the template refused the conversation"
TEMPLATE_ENDLESS = "the template ran too long"
PROMPT_DIFFERS = "the template writes the prompt otherwise than the answered turn"
NO_END = "no end token after an assistant turn"
END_INSIDE = "end token inside an assistant turn"
CALLS_DROPPED = "the template does not write the tool calls of a turn"
PARTS_UNKNOWN = "reasoning or calls can't be told apart from the answer"


class ChatProblem(ValueError):
    """Failure of one conversation; the caller knows file and line, and counts by phrase.

    problem: one of the phrases above
    found: details of this conversation, may be empty
    """

    def __init__(self, problem: str, found: str = "") -> None:
        self.problem, self.found = problem, " ".join(found.split())[:200]
        super().__init__(problem + (f" ({self.found})" if self.found else ""))

    def __reduce__(self) -> tuple:
        return type(self), (self.problem, self.found)
