from dataclasses import dataclass


@dataclass(frozen=True)
class Raw:
    prompt: object
    answers: tuple


class Reading:
    def read(self, raw, where):
        return raw

    def refuse_if_most(self, source):
        pass

    def lines(self):
        return []


def look(rows):
    return Reading()
