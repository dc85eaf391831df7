"""What is tested, what an alarm means and does not mean, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """What a reader should know of one test.

    Attributes:
        title: what the label is predicted from.
        means: what an alarm says, and what it does not.
        fix: what to do.
    """

    title: str
    means: str
    fix: str


_GROUP = "If they were taken in sessions, name these with --group-by, so that no session is in two splits"

MEANINGS = {
    "border": Meaning(
        "the border alone",
        "The frame of each image, a sixteenth of the side wide, tells the label. That is honest where "
        "the place belongs to the class (sky behind birds) or the object reaches the edge, and a "
        "mistake where frames, rulers, stamps or one background for each class do.",
        "Look at the pictures. Crop frames and stamps; where the background comes from the session, add "
        "images of each class on other backgrounds.",
    ),
    "surroundings": Meaning(
        "the image without its middle",
        "What surrounds the middle half of the image tells the label. Large objects reach beyond it, so "
        "this alarm alone is no mistake; it is one where the pictures show only background.",
        "Look at the pictures. If they show background only, crop to the object (`finetune explain "
        "localise` gives boxes), or add images of each class on other backgrounds.",
    ),
    "quality": Meaning(
        "how the file was saved",
        "JPEG quality, colour subsampling or the file format tell the label: the classes come from "
        "different sources. A network sees the traces of compression.",
        "Encode all images again in one way (the lowest quality among them, for all), or collect all "
        "classes from each source.",
    ),
    "size": Meaning(
        "width and height",
        "The number of pixels tells the label: the classes come from different sources, or were cropped "
        "differently. A network sees it as sharpness after the image is resized.",
        "Resize all images to one size before training, or collect all classes from each source.",
    ),
    "aspect": Meaning(
        "the aspect ratio",
        "The shape of the image tells the label. That is honest where objects are tall or wide and were "
        "cropped to their box. With --resize squash or pad, a network sees it.",
        "Train with --resize crop, or crop all images to one aspect ratio.",
    ),
    "brightness": Meaning(
        "brightness and contrast",
        "The mean grey level or the contrast of the image tells the label. That is honest where the "
        "class is dark or bright, and a mistake where light or scanner changed between the classes.",
        "Compare the pictures. If the light belongs to the session, balance sessions over classes, or "
        "train with --augmentation medium.",
    ),
    "exif": Meaning(
        "EXIF tags",
        "Camera, date or exposure tell the label: the classes were photographed at different times or "
        "with different cameras. A network sees no tags, but it may see the camera.",
        f"{_GROUP}, and photograph every class with each camera, on several days.",
    ),
    "order": Meaning(
        "the numbers in the file names",
        "The order of the file names tells the label: the classes were photographed or numbered one "
        "after the other. That alone harms nothing, since a network sees no names; it shows that "
        "sessions, and so light and background, go with the classes.",
        f"{_GROUP}. If the names were given class by class afterwards, ignore this.",
    ),
    "background": Meaning(
        "the predictions of the run",
        "Hiding what surrounds the middle half of an image changes the answer more than hiding that "
        "middle. The middle stands for the object, of which nothing is known; where objects lie "
        "elsewhere, this says little.",
        "Look at the maps. If the evidence is background, crop to the object, or add images of each "
        "class on other backgrounds.",
    ),
}
"""By name, in the order in which the tests are made. ``background`` is made of a run only."""
