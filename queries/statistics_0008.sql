-- Comparisons of two graphs, and joint partitions of two models' features: what was measured, each number beside its null. Times are UTC.

-- `comparison` is its key, a content hash of both sides, the matching and the settings; `kind` is graphs or joint. `a` and `b` are what the two
-- sides are, in words; `run_a`, `run_b` the runs (of a joint partition the aligned samples); `matching` is the key of the stored matching of
-- features, empty where both sides have the same nodes. `settings` and `notes` are JSON.
CREATE TABLE comparisons (
    comparison VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    a VARCHAR NOT NULL,
    b VARCHAR NOT NULL,
    run_a VARCHAR NOT NULL,
    run_b VARCHAR NOT NULL,
    model_a VARCHAR NOT NULL,
    model_b VARCHAR NOT NULL,
    matching VARCHAR NOT NULL,
    settings VARCHAR NOT NULL,
    notes VARCHAR NOT NULL,
    finished TIMESTAMP NOT NULL
);

-- Single numbers. `part` is what they belong to (coverage, edges, profiles, …), `quantity` which number, `site` where it is one site's, else empty.
-- `null` names what was drawn at random, empty where there is no null; then `null_mean` and the middle 95 %, `z` and `p` are null too.
CREATE TABLE comparison_values (
    comparison VARCHAR NOT NULL,
    part VARCHAR NOT NULL,
    quantity VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    value DOUBLE,
    "null" VARCHAR NOT NULL,
    null_mean DOUBLE,
    null_low DOUBLE,
    null_high DOUBLE,
    z DOUBLE,
    p DOUBLE,
    n BIGINT
);

-- Numbers along an axis: so many strongest edges, a share of the edges, a round of refinement, a layer.
CREATE TABLE comparison_curves (
    comparison VARCHAR NOT NULL,
    part VARCHAR NOT NULL,
    quantity VARCHAR NOT NULL,
    axis VARCHAR NOT NULL,
    place DOUBLE NOT NULL,
    value DOUBLE,
    "null" VARCHAR NOT NULL,
    null_mean DOUBLE,
    null_low DOUBLE,
    null_high DOUBLE
);

-- Which part of A corresponds to which of B: `weight` of a coupling between regions (`kind` region), whose rows and columns sum to their masses.
CREATE TABLE comparison_links (
    comparison VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    source VARCHAR NOT NULL,
    target VARCHAR NOT NULL,
    source_label VARCHAR,
    target_label VARCHAR,
    weight DOUBLE NOT NULL
);

-- Blocks of a joint partition: features of A and of B in each, how far it is shared (2·min of the sides' shares of their own features over their
-- sum) beside its null, and mean correlations inside A, inside B and between the two.
CREATE TABLE joint_blocks (
    comparison VARCHAR NOT NULL,
    site_a VARCHAR NOT NULL,
    site_b VARCHAR NOT NULL,
    block BIGINT NOT NULL,
    n_a BIGINT NOT NULL,
    n_b BIGINT NOT NULL,
    shared DOUBLE NOT NULL,
    null_mean DOUBLE,
    null_high DOUBLE,
    r_a DOUBLE,
    r_b DOUBLE,
    r_between DOUBLE
);

CREATE TABLE joint_members (
    comparison VARCHAR NOT NULL,
    site_a VARCHAR NOT NULL,
    site_b VARCHAR NOT NULL,
    side VARCHAR NOT NULL,
    feature BIGINT NOT NULL,
    block BIGINT NOT NULL
);
