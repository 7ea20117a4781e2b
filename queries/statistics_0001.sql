-- What was measured about the nodes of a model over a corpus or a task. Times are UTC.
-- Bulk tables have no primary key: a run's rows are written once, in the transaction that marks the run as done.

CREATE TABLE runs (
    run VARCHAR PRIMARY KEY,
    model VARCHAR NOT NULL,
    corpus VARCHAR NOT NULL,
    corpus_hash VARCHAR NOT NULL,
    basis VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    sequences BIGINT NOT NULL,
    total_sequences BIGINT NOT NULL,
    tokens BIGINT NOT NULL,
    seed BIGINT NOT NULL,
    version VARCHAR NOT NULL,
    arguments VARCHAR NOT NULL,
    started TIMESTAMP NOT NULL,
    finished TIMESTAMP
);

-- The sites of a run in topological order, each with its dictionary.
CREATE TABLE run_sites (
    run VARCHAR NOT NULL,
    ordinal INTEGER NOT NULL,
    site VARCHAR NOT NULL,
    layer INTEGER NOT NULL,
    dictionary VARCHAR NOT NULL,
    d_in INTEGER NOT NULL,
    d_sae INTEGER NOT NULL
);

-- The running state of a run that is not done, written together with its count of sequences in `runs`.
CREATE TABLE run_state (
    run VARCHAR NOT NULL,
    part VARCHAR NOT NULL,
    payload BLOB NOT NULL
);

-- One row per feature; the error node of a site has feature -1 and its Euclidean norm as the value (activation basis).
CREATE TABLE feature_statistics (
    run VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    layer INTEGER NOT NULL,
    kind VARCHAR NOT NULL,
    feature INTEGER NOT NULL,
    key VARCHAR NOT NULL,
    live BOOLEAN NOT NULL,
    count BIGINT NOT NULL,
    frequency DOUBLE NOT NULL,
    mean DOUBLE NOT NULL,
    variance DOUBLE NOT NULL,
    minimum DOUBLE NOT NULL,
    maximum DOUBLE NOT NULL,
    mean_active DOUBLE NOT NULL,
    mean_magnitude DOUBLE NOT NULL
);

-- Rank 0 is the strongest; `sequence` counts from 0 in the corpus, `sequence_key` names the pair of a task.
CREATE TABLE contexts (
    run VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    feature INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    value DOUBLE NOT NULL,
    sequence BIGINT NOT NULL,
    sequence_key VARCHAR,
    position INTEGER NOT NULL,
    token_ids INTEGER[] NOT NULL,
    before VARCHAR[] NOT NULL,
    token VARCHAR NOT NULL,
    after VARCHAR[] NOT NULL
);

-- Sums of products over all measured tokens, for live features with feature_i <= feature_j of one site; absent is 0.
CREATE TABLE second_moments (
    run VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    feature_i INTEGER NOT NULL,
    feature_j INTEGER NOT NULL,
    sum_product DOUBLE NOT NULL
);

-- Means per position, of runs that kept positions; absent is 0 where the position is in error_means, else not measured.
CREATE TABLE node_means (
    run VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    position INTEGER NOT NULL,
    feature INTEGER NOT NULL,
    mean DOUBLE NOT NULL
);

-- The error node as a vector (activation basis); position -1 is over all positions, and alone has a variance.
CREATE TABLE error_means (
    run VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    position INTEGER NOT NULL,
    tokens BIGINT NOT NULL,
    mean DOUBLE[] NOT NULL,
    variance DOUBLE[] NOT NULL
);

-- One metric value of one ablated (or plain) run of the model on one sequence.
CREATE TABLE scores (
    run VARCHAR NOT NULL,
    subject VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    ablation VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    baseline VARCHAR NOT NULL,
    size DOUBLE NOT NULL,
    seed BIGINT NOT NULL,
    sequence VARCHAR NOT NULL,
    value DOUBLE NOT NULL
);
