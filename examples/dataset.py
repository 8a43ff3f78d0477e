"A data set: any images and labels; here scikit-learn's digits at their own size, 8x8 in grey."
import numpy as np
from sklearn.datasets import load_digits

from fedmpqkd.data.images import register_dataset


def load():
    "Images and labels of training and test set; a pair of torch data sets does as well."
    grey, labels = load_digits(return_X_y=True)
    images = (grey.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)  # [N, 8, 8]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


register_dataset('small-digits', load)
# Files (see the page data/02d_own):
#   register_dataset('pets', lambda: from_folder('pets', size=64))        pets/train/<class>/*.jpg
#   register_dataset('scans', lambda: from_npz('scans.npz'))              train_x, train_y, test_x, test_y
#   register_dataset('flowers', lambda: from_parquet('flowers', size=64)) Hugging Face's Parquet files
