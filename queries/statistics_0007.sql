-- What features are called, by whom and why; and the words by which they are found. Times are UTC.

-- Every label that a feature was given, one of a kind, rule and source. `kind` is hand, file, neuronpedia or automatic. `rule` says which automatic
-- rule (or which explainer of Neuronpedia's) found it, `source` where it came from: a file's name, a dictionary of Neuronpedia's, runs. `evidence`
-- is in words the numbers that an automatic label stands on; `confidence` is theirs, from 0 to 1. `feature` is -1 for error nodes and outputs.
CREATE TABLE feature_labels (
    key VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    feature BIGINT NOT NULL,
    label VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    rule VARCHAR NOT NULL,
    source VARCHAR NOT NULL,
    author VARCHAR,
    confidence DOUBLE,
    evidence VARCHAR,
    written TIMESTAMP NOT NULL
);

-- The inverted index: how often a term stands in a field (label, token, context) of a feature; `origin` is what the text was taken from, the
-- statistics run of its tokens and contexts, or empty for labels.
CREATE TABLE search_terms (
    origin VARCHAR NOT NULL,
    field VARCHAR NOT NULL,
    key VARCHAR NOT NULL,
    term VARCHAR NOT NULL,
    n BIGINT NOT NULL
);

-- The texts that are indexed: how many terms each has. A text without terms has no row.
CREATE TABLE search_documents (
    origin VARCHAR NOT NULL,
    field VARCHAR NOT NULL,
    key VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    site VARCHAR NOT NULL,
    feature BIGINT NOT NULL,
    length BIGINT NOT NULL
);

-- The statistics runs that are indexed.
CREATE TABLE search_origins (
    origin VARCHAR PRIMARY KEY,
    indexed TIMESTAMP NOT NULL
);
