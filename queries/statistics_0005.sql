-- Parcellations: partitions of the features of several sites into blocks, all found by one method from one run of samples. A parcellation that is
-- written again replaces its rows here, except what people called its blocks. Times are UTC.

-- `parcellation` is its key, a content hash of samples, method and settings; `settings` is JSON.
CREATE TABLE parcellations (
    parcellation VARCHAR NOT NULL,
    samples VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    method VARCHAR NOT NULL,
    basis VARCHAR NOT NULL,
    settings VARCHAR NOT NULL,
    finished TIMESTAMP NOT NULL
);

-- Its sites in order. `d_sae` counts the dead features too, `chosen` is the level that regions are by default, `notes` is JSON.
CREATE TABLE site_partitions (
    parcellation VARCHAR NOT NULL,
    ordinal BIGINT NOT NULL,
    site VARCHAR NOT NULL,
    dictionary VARCHAR NOT NULL,
    d_sae BIGINT NOT NULL,
    chosen BIGINT NOT NULL,
    notes VARCHAR NOT NULL
);

-- The levels of a site's partition that are kept, 0 the finest, and the rule that chose each.
CREATE TABLE partition_levels (
    parcellation VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    level BIGINT NOT NULL,
    rule VARCHAR NOT NULL,
    n_blocks BIGINT NOT NULL
);

-- The block of every live feature at every kept level; features that are not here are dead.
CREATE TABLE block_members (
    parcellation VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    level BIGINT NOT NULL,
    feature BIGINT NOT NULL,
    block BIGINT NOT NULL
);

-- What was measured along the whole path of partitions from which the levels were chosen; `level` counts along the path. The description length
-- is in nats, `held_out` in nats per pair of features, `stability` an adjusted mutual information between halves; null where not measured.
CREATE TABLE path_scores (
    parcellation VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    level BIGINT NOT NULL,
    n_blocks BIGINT NOT NULL,
    largest BIGINT NOT NULL,
    description_length DOUBLE,
    held_out DOUBLE,
    stability DOUBLE,
    stability_low DOUBLE,
    stability_high DOUBLE
);

-- What people call blocks. A name is that of a set of features: `members` is a hash of them, so that it stays with the set when a parcellation
-- that is found again numbers its blocks otherwise.
CREATE TABLE block_labels (
    parcellation VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    level BIGINT NOT NULL,
    block BIGINT NOT NULL,
    members VARCHAR NOT NULL,
    label VARCHAR NOT NULL,
    written TIMESTAMP NOT NULL
);
