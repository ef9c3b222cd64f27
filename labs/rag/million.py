"""python -m labs.rag.million: flat, IVF, HNSW and IVF-PQ over 10,000, 100,000 and 1,000,000 vectors, on one thread.

The vectors are synthetic: clusters whose sizes follow a power law, each spread along directions of its own, so that their
intrinsic dimension is near that of the lab's own vectors. Queries are of two kinds: more points of the same clusters, and
the same pushed off by noise, as questions lie off the passages: the noise was set so that the number of neighbours grows
with the distance as it does around the lab's questions. At each size a thousand vectors are then added and a thousand
removed. Builds take about five minutes on one core, the measurement one. ``--keep FOLDER`` keeps the indexes there; with
``--build`` the run ends after building, so that the measurement can follow on a quiet machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from labs.rag.experiments import record

DIM, CLUSTERS, SPREAD, DIRECTIONS, NOISE = 64, 2000, 0.6, 16, 0.2
OFF = 1.6  # length of the noise that pushes a question off, where a point has length 1
SIZES = 10_000, 100_000, 1_000_000
QUERIES, K = 200, 10
LINKS, EF_BUILD, CODE = 16, 80, 16  # HNSW's M and efConstruction; bytes of a PQ code


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clustered(n: int, seed: int = 0) -> np.ndarray:
    """``n`` vectors of length 1 in 2,000 clusters; the j-th largest cluster has a share proportional to 1/j."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, CLUSTERS + 1)
    topics = unit(rng.standard_normal((50, DIM)))  # clusters lie in groups, as chunks of one document and one module do
    centres = unit(topics[rng.integers(0, 50, CLUSTERS)] + 0.8 * unit(rng.standard_normal((CLUSTERS, DIM))))
    scale = np.arange(1, DIRECTIONS + 1) ** -0.5
    scale *= SPREAD / np.linalg.norm(scale)
    axes = rng.standard_normal((CLUSTERS, DIRECTIONS, DIM)) / DIM**0.5
    cluster = rng.choice(CLUSTERS, n, p=share / share.sum())
    made = rng.standard_normal((n, DIM), dtype=np.float32) * (NOISE / DIM**0.5)
    for c in range(CLUSTERS):
        rows = np.flatnonzero(cluster == c)
        made[rows] += centres[c] + (rng.standard_normal((len(rows), DIRECTIONS)) * scale) @ axes[c]
    return unit(made)


def vectors() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(a million vectors, queries by kind)."""
    made = clustered(SIZES[-1] + QUERIES)
    points = made[-QUERIES:]
    noise = unit(np.random.default_rng(1).standard_normal(points.shape)) * OFF
    return made[:-QUERIES], {"points": points, "questions": unit(points + noise).astype(np.float32)}


def intrinsic_dimension(x: np.ndarray, q: np.ndarray, k: int = 20) -> float:
    """How the number of neighbours grows with the distance from ``q``, as a power: the maximum-likelihood estimate.

    Source: Levina and Bickel, NIPS 2004
    """
    squared, _ = faiss.knn(np.ascontiguousarray(q), np.ascontiguousarray(x), k)
    distances = np.sqrt(np.maximum(squared, 1e-9))
    return float(1 / np.mean(np.log(distances[:, -1:] / distances[:, :-1])))


def contrast(x: np.ndarray, q: np.ndarray, k: int = 10) -> float:
    """Mean distance from ``q`` to any vector over the mean distance to the k-th nearest: near 1 is hard."""
    squared, _ = faiss.knn(np.ascontiguousarray(q), np.ascontiguousarray(x), k)
    mean = np.sqrt(np.maximum(0, 2 - 2 * (q @ x[:: max(1, len(x) // 5000)].T))).mean()  # all have length 1
    return float(mean / np.sqrt(squared[:, -1]).mean())


def builders(n: int) -> dict[str, Callable[[], faiss.Index]]:
    lists = round(4 * n**0.5)

    def hnsw() -> faiss.Index:
        index = faiss.IndexHNSWFlat(DIM, LINKS)
        index.hnsw.efConstruction = EF_BUILD
        return index

    def ivf(kind: str) -> faiss.Index:
        index = faiss.index_factory(DIM, f"IVF{lists},{kind}")
        index.cp.min_points_per_centroid = 1  # no warning where 10,000 vectors have 400 lists
        index.cp.max_points_per_centroid = 64  # a training sample of 256,000 for 4,000 lists
        return index

    return {
        "flat": lambda: faiss.IndexFlatL2(DIM),
        "IVF": lambda: ivf("Flat"),
        "IVF-PQ": lambda: ivf(f"PQ{CODE}np"),  # np: no polysemous codes, which half a minute would go into, unused
        "HNSW": hnsw,
    }


def build(n: int, x: np.ndarray, folder: Path) -> None:
    for name, make in builders(n).items():
        path = folder / f"{name}-{n}.faiss"
        if path.exists():
            continue
        index, begin = make(), time.process_time()
        index.train(x[:n])
        index.add(x[:n])
        seconds = time.process_time() - begin
        (folder / f"{name}-{n}.seconds").write_text(str(seconds))
        faiss.write_index(index, str(path))
        print(f"{n:9,}  {name:7}{seconds:7.1f} s  {path.stat().st_size / n:6.1f} bytes a vector", flush=True)


def one_by_one(search: Callable, queries: np.ndarray) -> tuple[np.ndarray, float]:
    """(ids, median CPU seconds of a query), each query on its own, as they arrive; one thread, so that CPU time is time."""
    ids, seconds = [], []
    for i in range(len(queries)):
        begin = time.thread_time()
        ids.append(search(queries[i : i + 1]))
        seconds.append(time.thread_time() - begin)
    return np.array(ids), float(np.median(seconds))


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(set(f) & set(e)) / len(e) for f, e in zip(found.tolist(), exact.tolist(), strict=True)]))


def settings(name: str) -> list[dict]:
    """What is turned at query time; ``rerank``: so many candidates are compared once more, with their full vectors."""
    if name == "flat":
        return [{}]
    if name == "HNSW":
        return [{"ef": ef} for ef in (10, 20, 40, 80, 160, 320, 640)]
    probes = [{"nprobe": p} for p in (1, 2, 4, 8, 16, 32, 64, 128)]
    return probes if name == "IVF" else [*probes, *(p | {"rerank": 100} for p in probes)]


def measure(n: int, x: np.ndarray, queries: dict[str, np.ndarray], folder: Path) -> list[dict]:
    rows = []
    exact = {kind: faiss.knn(q, x[:n], K)[1] for kind, q in queries.items()}
    for name in builders(n):
        path = folder / f"{name}-{n}.faiss"
        index = faiss.read_index(str(path))
        for setting in settings(name):

            def search(q: np.ndarray, index=index, name=name, setting=setting) -> np.ndarray:
                if name == "HNSW":
                    index.hnsw.efSearch = setting["ef"]
                elif name != "flat":
                    index.nprobe = setting["nprobe"]
                many = setting.get("rerank", K)
                ids = index.search(q, many)[1][0]
                if many > K:
                    ids = ids[ids >= 0]
                    ids = ids[np.argsort(((x[ids] - q) ** 2).sum(1))[:K]]
                return np.pad(ids, (0, K - len(ids)), constant_values=-1)

            for kind, q in queries.items():
                asked = q[:50] if name == "flat" else q
                search(asked[:1])
                faiss.cvar.hnsw_stats.reset()
                faiss.cvar.indexIVF_stats.reset()
                ids, seconds = one_by_one(search, asked)
                counted = faiss.cvar.hnsw_stats.ndis + faiss.cvar.indexIVF_stats.ndis
                lists = index.nlist if name.startswith("IVF") else 0
                distances = n if name == "flat" else counted / len(asked) + lists
                rows.append(
                    {"n": n, "index": name, **setting, "queries": kind}
                    | {
                        "recall@10": round(recall(ids, exact[kind][: len(asked)]), 4),
                        "ms": float(f"{1e3 * seconds:.3g}"),
                        "distances": round(distances),
                        "bytes": path.stat().st_size,
                        "build CPU seconds": round(float(path.with_suffix(".seconds").read_text()), 1),
                    }
                )
    return rows


def changes(n: int, x: np.ndarray, folder: Path, many: int = 1000) -> list[dict]:
    """Seconds to add ``many`` vectors to a built index and to remove as many; None where FAISS offers no removal."""
    arriving = unit(x[:many] + x[many : 2 * many])  # between two stored vectors each
    leaving = np.random.default_rng(2).choice(n, many, replace=False)
    rows = []
    for name in builders(n):
        index = faiss.read_index(str(folder / f"{name}-{n}.faiss"))
        begin = time.process_time()
        index.add(arriving)
        added, begin = time.process_time() - begin, time.process_time()
        try:
            index.remove_ids(leaving)
            removed = float(f"{time.process_time() - begin:.3g}")
        except RuntimeError:
            removed = None
        added = float(f"{added:.3g}")
        rows.append({"n": n, "index": name, "changed": many, "CPU s to add": added, "CPU s to remove": removed})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    x, queries = vectors()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        for n in SIZES:
            build(n, x, folder)
        if options.build:
            return
        rows = [row for n in SIZES for row in measure(n, x, queries, folder)]
        changed = [row for n in SIZES for row in changes(n, x, folder)]
    geometry = {
        kind: {
            "intrinsic dimension": round(intrinsic_dimension(x[:10_000], q), 1),
            "contrast": round(contrast(x[:10_000], q), 2),
        }
        for kind, q in queries.items()
    }
    for row in [*rows, *changed]:
        print({k: v for k, v in row.items() if k not in ("bytes", "build CPU seconds")})
    record(
        "million",
        {
            "what": "recall@10 against exact search, median CPU time of a single query and distances computed, one thread",
            "dimension": DIM,
            "clusters": CLUSTERS,
            "queries of a kind": QUERIES,
            "HNSW": {"M": LINKS, "efConstruction": EF_BUILD},
            "IVF": {"lists": "4 √n", "PQ bytes": CODE},
            "first 10,000 vectors": geometry,
            "rows": rows,
            "changes": changed,
        },
    )


if __name__ == "__main__":
    main()
