package qc.model

/** What differs between models; written by qc. The rest of this module is the same for every model. */
object Interface {
    const val TITLE = @@quoted_title@@

    /** generate, embed or run */
    const val TASK = "@@task@@"
    const val HAS_TOKENIZER = @@has_tokenizer@@

    /** The token that a text to go on with starts with. */
    @JvmField val BOS: Long? = @@bos@@

    /** Tokens that end a text. */
    @JvmField val STOP: Set<Long> = setOf(@@stop@@)

    /** The largest number of tokens. */
    const val LIMIT = @@limit@@

    /** How the vectors of tokens become one: mean, max, cls or lasttoken. */
    const val POOLING = "@@pooling@@"
    const val NORMALIZE = @@normalize@@

    class Port(val name: String, val type: String, val shape: List<Int?>, val role: String)

    /** Of a shape, null stands for an axis of any length. */
    val INPUTS: List<Port> = listOf(
@@inputs@@
    )

    val OUTPUTS: List<Port> = listOf(
@@outputs@@
    )

    /** Each input that is part of a cache, with the output that replaces it in the next step. */
    val CACHES: List<Pair<String, String>> = listOf(
@@caches@@
    )

    /** Graphs of fixed shapes with the number of tokens that each takes, the smallest first; none if any length fits. */
    val GRAPHS: List<Pair<String, Int>> = listOf(
@@graphs@@
    )
}

/** Names of the inputs. */
object Inputs {
@@input_names@@
}

/** Names of the outputs. */
object Outputs {
@@output_names@@
}
