"""Every finding of the dataset doctor, as one table.

The severity of a code follows a rule. *Error*: what cannot be read, has two meanings, or leaves the dataset's folder;
training refuses. *Warning*: what is safely dropped or clipped, or likely to hurt. *Info*: what one should know.
Codes are stable: programs may rely on them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding.

    Attributes:
        code: stable, kebab-case.
        severity: `error`, `warning` or `info`.
        title: what it is, in a few words.
        explanation: what it means, what it does to training, what this program does about it.
        hint: what to do.
        repair: what `--fix` does about it; empty when it does nothing.
    """

    code: str
    severity: str
    title: str
    explanation: str
    hint: str
    repair: str = ""


_LEAVE_OUT = "leaves the image and its boxes out of the copy"
_DROP = "drops the box"
_OWN_FILE = "leaves the image out of the copy when the file is its own"

_TABLE = (
    # ---- images ----------------------------------------------------------------------------------------------
    Code(
        "image-missing",
        "error",
        "a listed image is not on disk",
        "The labels name an image that does not exist. Training would stop in the middle of an epoch.",
        "put the image back, remove its entry, or name the right folder with --images",
        _LEAVE_OUT,
    ),
    Code(
        "image-empty",
        "error",
        "an image of zero bytes",
        "The file exists but holds nothing: usually a copy that was interrupted or a disk that was full.",
        "copy the image again",
        _LEAVE_OUT,
    ),
    Code(
        "image-unreadable",
        "error",
        "an image that cannot be opened",
        "The file is not an image in any format that can be read, or it may not be read by this user.",
        "replace the file, or remove its entry",
        _LEAVE_OUT,
    ),
    Code(
        "image-truncated",
        "error",
        "an image that opens but does not decode",
        "The header is whole, but the pixels break off or are damaged. Programs that read only the header miss this; "
        "decoders fill the rest with grey or stop.",
        "copy the image again",
        _LEAVE_OUT,
    ),
    Code(
        "image-bomb",
        "error",
        "an image too large to decode safely",
        "Its header claims more pixels than any image of a dataset has. Decoding it may take all memory.",
        "scale the image down or remove it",
        _LEAVE_OUT,
    ),
    Code(
        "image-samples",
        "error",
        "an image whose samples have no agreed range",
        "Its samples are floating-point or 32-bit integers: nobody can say which value is white.",
        "save it with 8 or 16 bits a sample",
        _LEAVE_OUT,
    ),
    Code(
        "image-outside",
        "error",
        "an image outside the dataset's folder",
        "The path leaves the dataset's folder by `..`, as an absolute path, or through a link. A dataset from "
        "elsewhere could name any file of this machine, and a copy of the folder would lack the image.",
        "move the image into the folder, or name the folder of the images with --images",
        _LEAVE_OUT,
    ),
    Code(
        "image-exif-swapped",
        "error",
        "labels and image disagree about which way is up",
        "The image carries an EXIF orientation that turns it by 90 degrees, and the labels declare the size of the "
        "unturned image. The boxes have two meanings: some programs show the image turned, some do not.",
        "remove the EXIF orientation, or label the upright image again",
        "takes the orientation out of the copied image, so that it has the declared size",
    ),
    Code(
        "image-size",
        "warning",
        "an image of another size than declared",
        "The labels declare a width and height that the image does not have. The image's own size is used; the "
        "boxes are taken as pixels of the image as it is, which is wrong if it was resized after labelling.",
        "check some of these images with --html; write the true sizes with --fix",
        "writes the image's own size",
    ),
    Code(
        "image-size-undeclared",
        "info",
        "labels without the image's size",
        "The labels do not say the width and height, so they are read from the image.",
        "nothing needs to be done",
        "writes the image's own size",
    ),
    Code(
        "image-extension",
        "warning",
        "a file name that says another format than the content",
        "For example a PNG called `.jpg`. It is read by content here, but not by every program.",
        "rename the file",
        "renames the copy, in the labels too",
    ),
    Code(
        "image-exif-orientation",
        "info",
        "images turned by their EXIF orientation",
        "The stored pixels are turned or mirrored when the image is opened. Training, evaluation, prediction and "
        "this check all apply it, so boxes refer to the upright image.",
        "check one with --html",
    ),
    Code(
        "image-exif-invalid",
        "warning",
        "an EXIF orientation that does not exist",
        "EXIF defines the orientations 1 to 8. Another value is ignored here, and may be read otherwise elsewhere.",
        "remove the tag",
        "sets the orientation to 1 (upright)",
    ),
    Code(
        "image-16bit",
        "info",
        "images with 16 bits a channel",
        "They are scaled to 8 bits by their full range. Dim images lose contrast.",
        "convert them beforehand if their values use a part of the range",
    ),
    Code(
        "image-palette",
        "info",
        "images with a palette",
        "Their few colours are converted to RGB; nothing is lost.",
        "nothing needs to be done",
    ),
    Code(
        "image-cmyk",
        "info",
        "images in print colours (CMYK)",
        "They are converted to RGB without a colour profile, so colours may be somewhat off.",
        "convert them to RGB beforehand if colour matters",
    ),
    Code(
        "image-grey",
        "info",
        "grey images",
        "They are repeated over the three channels.",
        "nothing needs to be done",
    ),
    Code(
        "image-alpha",
        "info",
        "images with transparency",
        "The transparency is dropped; what lies behind transparent pixels becomes visible.",
        "flatten them beforehand if that matters",
    ),
    Code(
        "image-animated",
        "warning",
        "a file with more than one frame",
        "Only the first frame is used. The labels may belong to another.",
        "store the labelled frame as an image of its own",
    ),
    Code(
        "image-huge",
        "warning",
        "an image of more than 50 megapixels",
        "It is slow to decode, and its objects shrink to a few pixels at the network's size.",
        "cut such images into tiles, or scale them down",
    ),
    Code(
        "image-name-case",
        "warning",
        "a file name in another case than on disk",
        "The labels say `A.JPG` and the disk has `a.jpg`. The one on disk is used; other machines may not find it.",
        "rename the file or the entry",
        "makes the name and the entry agree",
    ),
    Code(
        "image-name-encoding",
        "warning",
        "a file name that is not UTF-8",
        "The name's bytes are no UTF-8 text, so it cannot be written into labels or reports faithfully.",
        "rename the file",
    ),
    Code(
        "image-duplicate",
        "warning",
        "the same image twice in a split",
        "Two entries show the same pixels. The image counts twice in training or in the metrics.",
        "remove one of them",
    ),
    Code(
        "image-near-duplicate",
        "info",
        "nearly the same image twice in a split",
        "Frames of a video, or copies that were resized or compressed again. Harmless inside a split, but such "
        "images must not be drawn into different splits.",
        "split with --resplit, which keeps them on one side",
    ),
    Code(
        "image-leak",
        "warning",
        "the same image in two splits",
        "The network is measured on an image it was trained on, so the metrics are better than the truth.",
        "make new splits with --resplit, or remove the image from one",
    ),
    Code(
        "image-near-leak",
        "warning",
        "nearly the same image in two splits",
        "A frame next to it, or a copy that was resized, is in another split: the metrics are better than the truth.",
        "make new splits with --resplit",
    ),
    Code(
        "image-other-boxes",
        "warning",
        "the same image with different boxes",
        "Two entries show the same pixels but their boxes differ. The network is taught both.",
        "keep the entry whose boxes are right",
    ),
    Code(
        "image-no-objects",
        "info",
        "images without objects",
        "They teach what is background and take part in training. Too many of them, or images where the labels were "
        "forgotten, hurt.",
        "check some with --html",
    ),
    # ---- boxes -------------------------------------------------------------------------------------------------
    Code(
        "box-count",
        "error",
        "a box that is not four numbers",
        "A box needs exactly four numbers. With more or fewer its meaning is a guess.",
        "correct or remove the box",
        _DROP,
    ),
    Code(
        "box-not-number",
        "error",
        "a box with something that is not a number",
        "One of the four values is text, null or a list.",
        "correct or remove the box",
        _DROP,
    ),
    Code(
        "box-not-finite",
        "error",
        "a box with NaN or infinity",
        "One such value turns the loss, and then every weight, into NaN.",
        "correct or remove the box",
        _DROP,
    ),
    Code(
        "box-inverted",
        "error",
        "a box of negative width or height",
        "Its right edge lies left of its left edge, or its bottom above its top. Swapped corners and a wrong "
        "convention (corners read as width and height) look the same.",
        "correct or remove the box",
        _DROP,
    ),
    Code(
        "box-zero-size",
        "warning",
        "a box of zero width or height",
        "It marks no pixels, so nothing can be learned from it. It is dropped.",
        "remove the box, or draw it again",
        _DROP,
    ),
    Code(
        "box-outside",
        "error",
        "a box wholly outside its image",
        "No pixel of the image lies in the box: it belongs to another image, or coordinates are mixed up.",
        "correct or remove the box",
        _DROP,
    ),
    Code(
        "box-partly-outside",
        "warning",
        "a box that reaches over the image's edge",
        "The part outside cannot be seen, so the box is clipped to the image.",
        "clip it with --fix",
        "clips the box to the image",
    ),
    Code(
        "box-whole-image",
        "info",
        "boxes that cover the whole image",
        "Common where labels of classification were turned into boxes. They teach nothing about where things are.",
        "check some with --html",
    ),
    Code(
        "box-below-2px",
        "info",
        "boxes below 2 pixels at the network's size",
        "After the image is scaled to the network's size these objects are smaller than two pixels: they cannot be "
        "seen, and the network is punished for missing them.",
        "train at a larger --imgsz, cut the images into tiles, or remove the boxes",
    ),
    Code(
        "box-below-8px",
        "info",
        "tiny objects: below 8 pixels at the network's size",
        "The finest feature map has one cell for 8 pixels. Objects below that are found badly.",
        "train at a larger --imgsz, or cut the images into tiles",
    ),
    Code(
        "box-aspect",
        "info",
        "boxes more than 20 times as long as wide",
        "Often a slip of the hand. A rod seen at a slant fills little of its box.",
        "check some with --html",
    ),
    Code(
        "box-duplicate",
        "warning",
        "the same object labelled twice",
        "Two boxes of one class overlap by more than 0.9 (IoU). One query can match one of them; the other teaches a "
        "second detection of the same object.",
        "remove one of them",
        "drops the later one",
    ),
    Code(
        "box-two-classes",
        "warning",
        "one object with two classes",
        "Two boxes of different classes overlap by more than 0.9 (IoU): a slip, or a class that is part of another.",
        "keep one of them, unless both are meant",
    ),
    Code(
        "box-crowd",
        "info",
        "crowd boxes",
        "A crowd box marks a group. Crowds are left out of training and ignored by the metrics, as COCO defines.",
        "nothing needs to be done",
    ),
    Code(
        "box-no-area",
        "info",
        "annotations without an area",
        "The metrics for small, medium and large objects need it; width times height is used.",
        "nothing needs to be done",
        "writes width times height",
    ),
    Code(
        "box-over-queries",
        "warning",
        "more boxes in an image than the network has queries",
        "Each query finds at most one object, so the rest of them cannot be found.",
        "train with more queries (--set model.queries=...), or cut the images into tiles",
    ),
    Code(
        "box-difficult",
        "info",
        "objects marked as difficult",
        "Pascal VOC's metrics leave them out. Here they count like any other object.",
        "nothing needs to be done",
    ),
    # ---- categories --------------------------------------------------------------------------------------------
    Code(
        "category-unknown",
        "error",
        "an annotation of a category that is not listed",
        "Its class has no name. Elsewhere this ends as an index error on the device, long after the start.",
        "add the category to the list, or correct the annotation",
        _DROP,
    ),
    Code(
        "category-conflict",
        "error",
        "one category id with two names",
        "Two entries or two splits give the same id different names, so a label has two meanings.",
        "give both splits the same categories",
    ),
    Code(
        "category-count",
        "error",
        "a number of classes that is not that of the names",
        "`nc` and the list of names disagree, so labels may speak of classes without a name.",
        "correct nc or the names",
    ),
    Code(
        "category-malformed",
        "error",
        "a category without id or name",
        "A category needs a name, and an id that is an integer or a word.",
        "correct the list of categories",
    ),
    Code(
        "category-none",
        "error",
        "no categories",
        "The dataset names no class, so there is nothing to learn.",
        "add the list of categories",
    ),
    Code(
        "category-unused",
        "info",
        "a category without any box",
        "The network gets an output for it that never fires. It does no harm.",
        "remove it if it is not meant",
    ),
    Code(
        "category-gaps",
        "info",
        "category ids that do not run from 0 or 1 without gaps",
        "They are mapped to 0 .. classes - 1 inside and written out as they were. Nothing needs to be renumbered.",
        "nothing needs to be done",
    ),
    Code(
        "category-duplicate-name",
        "warning",
        "two categories of the same name",
        "Results of the two cannot be told apart by name.",
        "merge or rename them",
    ),
    Code(
        "category-similar-names",
        "warning",
        "categories whose names differ in case, space or one letter",
        "Usually one class that was typed in two ways: its examples are split, and each half is punished for finding "
        "the other.",
        "merge them if they are one class",
    ),
    Code(
        "category-only-val",
        "warning",
        "a class that training never sees",
        "It has boxes in val or test but none in train: it cannot be learned, and it pulls the mean AP down.",
        "make new splits with --resplit, or label examples",
    ),
    Code(
        "category-imbalance",
        "info",
        "classes of very different frequency",
        "The rarest class has less than a hundredth of the boxes of the most frequent one.",
        "look at the AP of each class, not only at the mean",
    ),
    Code(
        "category-few",
        "warning",
        "a class with fewer than 10 boxes in train",
        "Too few examples to learn from; its AP is mostly luck.",
        "label more examples",
    ),
    # ---- structure ---------------------------------------------------------------------------------------------
    Code(
        "file-missing",
        "error",
        "a label file or folder that is not there",
        "The dataset names a file that does not exist or may not be read.",
        "correct the path",
        _OWN_FILE,
    ),
    Code(
        "file-malformed",
        "error",
        "a label file that cannot be read",
        "It is not valid JSON, YAML, XML or text, or its structure is not the format's.",
        "open the file at that line; export the labels again",
        _OWN_FILE,
    ),
    Code(
        "file-bounds",
        "error",
        "a label file beyond any sensible size or depth",
        "Files are read up to 4 GiB and lists up to some hundred levels deep. More is damage or malice.",
        "split the file, or export the labels again",
        _OWN_FILE,
    ),
    Code(
        "file-repeated-key",
        "error",
        "a key that appears twice in a label file",
        "Most readers silently keep the last one; half of the labels may be gone.",
        "keep one of them",
    ),
    Code(
        "file-bom",
        "info",
        "a label file with a byte order mark",
        "It is skipped here; other programs take it for a part of the first word.",
        "save the file as UTF-8 without a mark",
        "removes it",
    ),
    Code(
        "file-crlf",
        "info",
        "a label file with Windows line ends",
        "They are read like any other here; other programs take them for a part of the last word.",
        "nothing needs to be done",
        "writes Unix line ends",
    ),
    Code(
        "entry-malformed",
        "error",
        "an image's entry that lacks what it needs",
        "An image needs an id and a file name.",
        "correct or remove the entry",
        "drops the entry",
    ),
    Code(
        "annotation-malformed",
        "error",
        "an annotation that lacks what it needs",
        "An annotation needs an image id and a category id.",
        "correct or remove the annotation",
        _DROP,
    ),
    Code(
        "image-id-duplicate",
        "error",
        "one image id for two images",
        "Annotations of this id belong to either.",
        "number the images again",
    ),
    Code(
        "annotation-id-duplicate",
        "warning",
        "one annotation id for two boxes",
        "Some programs keep only the last box of an id. Here both count, and the ids are numbered again.",
        "number the annotations again",
        "numbers the later ones again",
    ),
    Code(
        "id-not-integer",
        "warning",
        "ids that are not integers",
        "Ids are integers in COCO. Others are read as integers where they are, else numbered in order. For categories "
        "the message says which id became which number: detections carry the number.",
        "write them as integers",
    ),
    Code(
        "annotation-orphan",
        "error",
        "an annotation without its image",
        "It names an image id that is not in the list: the list is incomplete, or ids are mixed up.",
        "add the image, or remove the annotation",
        _DROP,
    ),
    Code(
        "label-orphan",
        "warning",
        "a label file without its image",
        "It is ignored. Perhaps the image was lost, or one of the two was renamed.",
        "put the image back, or remove the file",
        "leaves the file out of the copy",
    ),
    Code(
        "label-missing",
        "warning",
        "an image without a label file",
        "It counts as an image without objects. An empty label file says so on purpose; a missing one may be an "
        "accident.",
        "add an empty label file if there is nothing on it",
        "writes an empty label file",
    ),
    Code(
        "label-columns",
        "error",
        "a label line of the wrong number of columns",
        "A line is `class cx cy w h`, or `class` and at least three points of a polygon.",
        "correct or remove the line",
        _DROP,
    ),
    Code(
        "yolo-pose",
        "warning",
        "keypoints that data.yaml does not announce",
        "There is no `kpt_shape`, but nearly all label lines are of one length, and their first four numbers are a box "
        "that holds the points behind it: these are labels of a pose dataset. Read as polygons, their boxes would be "
        "wrong; so the box is taken, and the points are dropped.",
        "write kpt_shape into data.yaml",
    ),
    Code(
        "label-pixels",
        "error",
        "coordinates that are pixels, not shares of the image",
        "YOLO labels run from 0 to 1. Values above 2 or below -1 are pixels or damage.",
        "divide by the image's width and height",
        _DROP,
    ),
    Code(
        "label-beyond-one",
        "warning",
        "coordinates beyond 0 to 1",
        "YOLO labels run from 0 to 1. The box is clipped to the image.",
        "clip it with --fix",
        "clips the box to the image",
    ),
    Code(
        "yolo-path",
        "warning",
        "a path: that does not exist",
        "`path:` names a folder of another machine. The folder of the data.yaml is used.",
        "correct or remove path:",
        "removes the line",
    ),
    Code(
        "voc-filename",
        "warning",
        "a <filename> that names another image",
        "The image of the same name as the XML file is used.",
        "correct the <filename>",
        "writes the image's name",
    ),
    Code(
        "voc-folder",
        "info",
        "a <folder> that names another folder",
        "It is ignored; images are looked for in the dataset's image folder.",
        "nothing needs to be done",
    ),
    Code(
        "split-missing",
        "error",
        "a split that is named but not there",
        "The dataset names a split whose folder, list or file does not exist, or has no train split at all.",
        "correct the path of the split",
    ),
    Code(
        "split-empty",
        "error",
        "a split without images",
        "There is nothing to train on, or nothing to measure with.",
        "put images into the split, or make new splits with --resplit",
    ),
    Code(
        "split-no-objects",
        "warning",
        "a split without a single box",
        "No AP can be computed on it. A train split without a box, or with nothing but crowds, is an error: nothing "
        "can be learned from it, and training refuses it.",
        "check that the labels are where they belong",
    ),
    Code(
        "split-equal",
        "warning",
        "val is the same as train",
        "The metrics say how well the images were learned by heart, not how good the network is.",
        "make new splits with --resplit",
    ),
    Code(
        "split-made",
        "info",
        "no val split: one was drawn",
        "One part of the images, drawn with the seed, is kept for measuring. Images that look alike may fall on "
        "both sides.",
        "make leak-free splits with --resplit",
    ),
)

CODES = {entry.code: entry for entry in _TABLE}
