-- Matchings: which features of two models, checkpoints or dictionaries are the same, by their correlation on the same text. A matching that is made
-- again replaces its rows. Times are UTC.

-- `matching` is its key, a content hash of `aligned` (the key of the samples) and settings (JSON). `source` is the text. Counts and shares are of
-- mutual nearest neighbours over all sites at once: `n_a` and `n_b` live features, `n_matched` pairs at or above `threshold` (null where none is),
-- `null_share` the share of A's features that chance matches there.
CREATE TABLE matchings (
    matching VARCHAR NOT NULL,
    aligned VARCHAR NOT NULL,
    model_a VARCHAR NOT NULL,
    model_b VARCHAR NOT NULL,
    source VARCHAR NOT NULL,
    settings VARCHAR NOT NULL,
    n_a BIGINT NOT NULL,
    n_b BIGINT NOT NULL,
    n_mutual BIGINT NOT NULL,
    n_matched BIGINT NOT NULL,
    share_a DOUBLE NOT NULL,
    share_b DOUBLE NOT NULL,
    mean_score DOUBLE,
    null_share DOUBLE NOT NULL,
    threshold DOUBLE,
    finished TIMESTAMP NOT NULL
);

-- The same for every pair of sites, each searched by itself. `n_all` counts the matches over all sites at once that lie in this pair. Linear CKA
-- and the mean SVCCA correlation are of the sites' raw values, with the numbers of directions kept; null where these were not summed.
CREATE TABLE matched_sites (
    matching VARCHAR NOT NULL,
    ordinal BIGINT NOT NULL,
    site_a VARCHAR NOT NULL,
    site_b VARCHAR NOT NULL,
    layer_a BIGINT NOT NULL,
    layer_b BIGINT NOT NULL,
    n_a BIGINT NOT NULL,
    n_b BIGINT NOT NULL,
    n_mutual BIGINT NOT NULL,
    n_matched BIGINT NOT NULL,
    n_all BIGINT NOT NULL,
    share_a DOUBLE NOT NULL,
    share_b DOUBLE NOT NULL,
    mean_score DOUBLE,
    null_share DOUBLE NOT NULL,
    threshold DOUBLE,
    cka DOUBLE,
    svcca DOUBLE,
    kept_a BIGINT,
    kept_b BIGINT
);

-- The pairs of features: `source` is a feature of A, `target` one of B, `score` their correlation. `method` says among what they were searched:
-- site-pairs or all-sites. `mutual`: each is the other's nearest; `assigned`: the optimal assignment joins them; `significant`: at or above the
-- threshold of that search.
CREATE TABLE matched_pairs (
    matching VARCHAR NOT NULL,
    source VARCHAR NOT NULL,
    target VARCHAR NOT NULL,
    site_a VARCHAR NOT NULL,
    site_b VARCHAR NOT NULL,
    feature_a BIGINT NOT NULL,
    feature_b BIGINT NOT NULL,
    score DOUBLE NOT NULL,
    mutual BOOLEAN NOT NULL,
    assigned BOOLEAN NOT NULL,
    significant BOOLEAN NOT NULL,
    method VARCHAR NOT NULL
);

-- How the scores of mutual nearest neighbours are spread, and those by chance: counts in bins of width 0.02 from `low` on, the latter a mean over
-- draws. The sites are empty text for the search over all sites.
CREATE TABLE matched_scores (
    matching VARCHAR NOT NULL,
    method VARCHAR NOT NULL,
    site_a VARCHAR NOT NULL,
    site_b VARCHAR NOT NULL,
    low DOUBLE NOT NULL,
    n BIGINT NOT NULL,
    null_n DOUBLE NOT NULL
);
