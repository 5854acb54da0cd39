/// What differs between models; written by qc. The rest of this package is the same for every model.
public enum Interface {
    public static let title = @@quoted_title@@

    /// generate, embed or run
    public static let task = "@@task@@"
    public static let hasTokenizer = @@has_tokenizer@@

    /// The token that a text to go on with starts with.
    public static let bos: Int? = @@bos@@

    /// Tokens that end a text.
    public static let stop: Set<Int> = [@@stop@@]

    /// The largest number of tokens.
    public static let limit = @@limit@@

    /// How the vectors of tokens become one: mean, max, cls or lasttoken.
    public static let pooling = "@@pooling@@"
    public static let normalize = @@normalize@@

    public struct Port {
        public let name: String
        public let type: String

        /// nil stands for an axis of any length.
        public let shape: [Int?]
        public let role: String
    }

    public static let inputs: [Port] = [
@@inputs@@
    ]

    public static let outputs: [Port] = [
@@outputs@@
    ]

    /// Each input that is part of a cache, with the output that replaces it in the next step.
    public static let caches: [(past: String, present: String)] = [
@@caches@@
    ]

    /// Graphs of fixed shapes with the number of tokens that each takes, the smallest first; none if any length fits.
    public static let graphs: [(file: String, size: Int)] = [
@@graphs@@
    ]
}

/// Names of the inputs.
public enum Inputs {
@@input_names@@
}

/// Names of the outputs.
public enum Outputs {
@@output_names@@
}
