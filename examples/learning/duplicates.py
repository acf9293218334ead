"""Near-duplicate files."""

from __future__ import annotations

import hashlib
import zlib


class Duplicates:
    """Near-duplicate files: MinHash where `datasketch` is installed; else exact duplicates of whole files are found."""

    def __init__(self) -> None:
        try:
            import datasketch
        except ImportError:
            self.index, self.exact = None, set[bytes]()
            return
        self.minhash = lambda: datasketch.MinHash(num_perm=64, hashfunc=zlib.crc32)
        self.index, self.count = datasketch.MinHashLSH(threshold=0.7, num_perm=64), 0

    def seen(self, text: str) -> bool:
        """Whether a near-duplicate came before; the text is remembered if not."""
        if self.index is None:
            digest = hashlib.sha256(text.encode()).digest()
            known = digest in self.exact
            self.exact.add(digest)
            return known
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        shingles = {"\n".join(lines[i : i + 3]).encode() for i in range(max(1, len(lines) - 2))}
        sketch = self.minhash()
        sketch.update_batch(list(shingles))
        if self.index.query(sketch):
            return True
        self.index.insert(self.count, sketch)
        self.count += 1
        return False
