"""Choices by name, and a dataclass from a dict: what lerobot uses of draccus."""

import dataclasses


class ChoiceRegistry:
    _choices = None

    @classmethod
    def register_subclass(cls, name):
        def register(subclass):
            cls._registry()[name] = subclass
            return subclass

        return register

    @classmethod
    def _registry(cls):
        if cls._choices is None:
            cls._choices = {}
        return cls._choices

    @classmethod
    def get_known_choices(cls):
        return dict(cls._registry())

    @classmethod
    def get_choice_class(cls, name):
        return cls._registry()[name]

    @classmethod
    def get_choice_name(cls, subclass):
        return next(name for name, known in cls._registry().items() if known is subclass)


class DecodingError(Exception):
    pass


def decode(cls, raw):
    unknown = sorted(set(raw) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise DecodingError(f"The fields `{', '.join(unknown)}` are not valid for {cls.__name__}")
    return cls(**raw)
