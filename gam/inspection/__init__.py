"""How adapters relate before they are merged: figures, advice, a picture."""
