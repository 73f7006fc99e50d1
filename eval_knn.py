"""Weighted k-nearest-neighbour classification (NPID, section 3.4), with retrieval and clustering figures.

A test image takes the class with the largest sum of exp(s / tau) over its K nearest training images, s the cosine of
their features. Nothing is trained. The paper's setting is K = 200, tau = 0.07, one central crop.

    python eval_knn.py runs/npid-cifar10-seed0/checkpoint.pth
    python eval_knn.py runs/npid-cifar10-seed0/checkpoint.pth --k 1 20 200 --tau 0.07 0.1   # all in one pass
    python eval_knn.py runs/npid-cifar10-seed0/checkpoint.pth --train-features bank         # the bank as it was left
    python eval_knn.py runs/npid-imagenet-seed0/checkpoint.pth --data places205             # transfer, Table 3
    python eval_knn.py resnet50.pth --arch resnet50 --data imagenet                 # torchvision's or timm's names
    python eval_knn.py lemniscate_resnet18.pth.tar --arch resnet18 --layer head --data imagenet   # the authors' own
    python eval_knn.py random --arch resnet18 --data cifar10                                # an untrained network
    python eval_knn.py pixels --data cifar10                                                # no network at all

If a run had a part of its images (--imbalance, --file-list, --val-list), the same part is used here, unless --data is
given: a long-tailed run has long-tailed neighbours.

The last line of the output is the result as JSON; it is also appended to eval.jsonl beside the checkpoint. For each K
and tau: top-1 and top-5 accuracy in percent. --retrieval adds precision at 1 and 10, the share of the nearest training
images that have the query's class, and the training images' ratio edge intra-class (DeepCluster, section 4.1);
--clustering the NMI and AMI (arithmetic mean) between k-means clusters of the test features and the classes, and
cluster_accuracy, with the best one-to-one assignment of clusters to classes.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import common


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    common.add_network_options(parser, ', or "pixels" for standardised pixels')
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--k", "--num-neighbors", dest="num_neighbors", type=common.COUNT, nargs="+", default=[200],
                          metavar="K", help="K, neighbours that vote")
    protocol.add_argument("--tau", "--temperature", dest="temperature", type=common.POSITIVE, nargs="+", default=[0.07],
                          metavar="TAU", help="tau in the weight exp(s / tau)")
    protocol.add_argument("--train-features", choices=["clean", "bank"], default="clean", help="clean: recomputed from "
                          "central crops; bank: as training left it, augmented and up to an epoch old, of the "
                          "images of the run, whatever --subset says")
    protocol.add_argument("--layer", choices=["auto", "head", "backbone"], default="auto", help="features: the head's "
                          "output or the backbone's; auto: the head of these scripts, the backbone of foreign files")
    protocol.add_argument("--retrieval", action="store_true", help="precision at 1 and 10, ratio edge intra-class")
    protocol.add_argument("--clustering", action="store_true", help="NMI, AMI and accuracy of k-means on test features")
    protocol.add_argument("--num-clusters", type=common.COUNT, metavar="N",
                          help="of --clustering; default: as many as classes")
    common.add_data_options(parser)
    parser.add_argument("--seed", type=common.COUNT_OR_ZERO, default=0, help="of subset, clustering, random weights")
    parser.add_argument("--batch-size", type=common.COUNT, default=256, help="images in one forward pass")
    common.add_device_options(parser)
    args = parser.parse_args(argv)
    args.typed = common.typed(parser, argv)
    idle = dict.fromkeys(("arch", "width", "layer", "amp"), (args.checkpoint != "pixels", "a network"))
    common.note_idle(args, idle | dict(num_clusters=(args.clustering, "--clustering"),
                                       subset=(args.train_features == "clean", "--train-features clean")))
    if args.checkpoint in ("random", "pixels") and args.train_features == "bank":
        parser.error(f"{args.checkpoint} has no memory bank: use --train-features clean")
    if args.layer == "backbone" and args.train_features == "bank":
        parser.error("the memory bank has the head's output, not the backbone's: use --train-features clean")
    return args


def retrieval(queries: Tensor, query_labels: Tensor, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of the nearest 1 and 10 of features (N, D) that have the class of the query (Q, D), mean in percent."""
    index = common.neighbors(queries, features, min(10, len(features)))[1]
    same = (labels[index] == query_labels[:, None]).float()
    return dict(precision_at_1=round(100 * same[:, 0].mean().item(), 2),
                precision_at_10=round(100 * same.mean().item(), 2))


def ratio_edge(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Ratio edge intra-class of the 10-NN graph of features (N, D), mean over classes, in percent."""
    itself = torch.arange(len(features), device=features.device)
    index = common.neighbors(features, features, min(10, len(features) - 1), exclude=itself)[1]
    shares = common.ratio_edge_intra_class(index.cpu(), labels.cpu())  # mps has no float64
    return dict(ratio_edge=round(100 * shares.nanmean().item(), 2))


def clustering(features: Tensor, labels: Tensor, k: int, seed: int) -> dict[str, float]:
    """Agreement of a k-means of features (N, D) with the classes in percent: NMI and AMI, arithmetic mean, and the
    accuracy with the best one-to-one assignment of clusters to classes."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    found = common.kmeans(features, k, seed=seed).labels.cpu().numpy()
    truth = labels.cpu().numpy()
    table = contingency_matrix(truth, found)
    best = linear_sum_assignment(table, maximize=True)
    return dict(nmi=round(100 * normalized_mutual_info_score(truth, found, average_method="arithmetic"), 2),
                ami=round(100 * adjusted_mutual_info_score(truth, found, average_method="arithmetic"), 2),
                cluster_accuracy=round(100 * table[best].sum() / len(truth), 2))


def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise common.Fault("kNN takes one process: start it without a launcher")
    amp = common.amp_default(device) if args.amp is None else args.amp
    path, bank = Path(args.checkpoint), None
    pixels = args.checkpoint == "pixels"
    if args.checkpoint in ("random", "pixels"):  # of pixels the network is idle
        train = common.load_train(args, None, "train", device)
        torch.manual_seed(args.seed)
        encoder = common.untrained_encoder(args.arch or "resnet18", args.width or 64, train.small, device)
        if args.layer == "backbone":
            encoder.head = None
    else:
        encoder = common.chosen_encoder(args, device, args.layer)
        if args.train_features == "bank":
            bank = encoder.bank
            if bank is None:
                raise common.Fault(f"{path} has no memory bank: use --train-features clean")
            if encoder.head is None:
                raise common.Fault(f"the memory bank of {path} has the output of a head that cannot be read: use "
                                   "--train-features clean")
        train = common.load_train(args, encoder, "train" if bank is None else "pretrain", device)
    test = common.load_test(args, train, device)

    def embed(images: Tensor) -> Tensor:
        if pixels:
            return F.normalize(images.flatten(1))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return encoder.embed(images)

    if bank is not None and (what := common.differences(encoder.data, train.identity())):
        raise common.Fault(f"the bank of {path} belongs to other images ({encoder.data['name']}, "
                           f"{encoder.data['images']:,}, not {train.name}, {len(train):,}; {', '.join(what)} differ): "
                           "use --train-features clean")
    known = train.labels >= 0
    if not known.any():
        raise common.Fault(f"{train.name} has no classes: name images that have a folder for each by --data")
    if stray := int((test.labels < 0).sum()):
        raise common.Fault(f"{stray:,} of the {len(test):,} test images of {test.name} are in no class folder")
    if max(args.num_neighbors) > known.sum():
        raise common.Fault(f"--k {max(args.num_neighbors)} is more than the {known.sum()} training images")
    num_clusters = args.num_clusters or len(train.classes)
    if args.clustering and num_clusters > len(test):
        raise common.Fault(f"--clustering: {num_clusters} clusters are more than the {len(test)} test images; lower "
                           "--num-clusters")
    queries = common.extract(device, test, embed, args.batch_size)
    features = common.extract(device, train, embed, args.batch_size) if bank is None else bank.to(device)
    features, labels = features[known.to(device)], train.labels[known].to(device)

    accuracy = common.knn_accuracy(queries, test.labels.to(device), features, labels, len(train.classes),
                                   num_neighbors=args.num_neighbors, temperatures=args.temperature)
    rows = [dict(num_neighbors=k, temperature=tau, top1=round(top1, 2), top5=round(top5, 2))
            for (k, tau), (top1, top5) in accuracy.items()]
    result = dict(protocol="knn", checkpoint=args.checkpoint, checkpoint_sha256=encoder.sha256,
                  arch=None if pixels else encoder.arch, width=None if pixels else encoder.width,
                  layer=None if pixels else "backbone" if encoder.head is None else "head", image_size=train.size,
                  mean=train.mean, std=train.std,
                  checksum=train.identity()["checksum"], git=common.git_commit(),
                  data=train.name, subset=args.subset if bank is None else encoder.options["subset"],
                  test_subset=args.test_subset, seed=args.seed, amp=amp, train_features=args.train_features,
                  feature_dim=features.shape[1], train_images=len(features), test_images=len(test),
                  num_neighbors=rows[0]["num_neighbors"], temperature=rows[0]["temperature"], knn_top1=rows[0]["top1"],
                  knn_top5=rows[0]["top5"], knn=rows)
    if args.retrieval:
        result |= retrieval(queries, test.labels.to(device), features, labels) | ratio_edge(features, labels)
    if args.clustering:
        result |= clustering(queries, test.labels, num_clusters, args.seed)
    common.publish(args, result)


if __name__ == "__main__":
    common.launch(main, parse_args)
