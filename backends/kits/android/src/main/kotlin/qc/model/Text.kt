package qc.model

import kotlin.math.max
import kotlin.math.sqrt

/** Text to token ids and back. [HuggingFaceText] reads the tokenizer of the model. */
interface Text {
    /** Token ids, with the special tokens around them if [special]. */
    fun encode(text: String, special: Boolean): LongArray

    /** Text of token ids, without special tokens. */
    fun decode(tokens: LongArray): String
}

/** Token ids of a text to go on with. */
internal fun Text.prompt(text: String): LongArray {
    val tokens = encode(text, false)
    return Interface.BOS?.let { longArrayOf(it) + tokens } ?: tokens
}

/** Token ids of a sentence, cut to what the model takes. */
internal fun Text.sentence(text: String): LongArray {
    val tokens = encode(text, true)
    if (tokens.size <= Interface.LIMIT) return tokens
    return tokens.copyOf(Interface.LIMIT - 1) + tokens.last()
}

/**
 * The text of [tokens] piece by piece, each piece complete characters. A token's text depends on its neighbours, so new
 * is what the last piece with the token has more than without it.
 */
internal fun Text.stream(tokens: Sequence<Long>): Sequence<String> = sequence {
    val held = ArrayList<Long>()
    var start = 0
    var shown = 0
    fun text(from: Int, to: Int) = if (from < to) decode(held.subList(from, to).toLongArray()) else ""
    for (token in tokens) {
        held.add(token)
        val before = text(start, shown)
        val after = text(start, held.size)
        if (after.length > before.length && !after.endsWith("\uFFFD")) {
            yield(after.substring(before.length))
            start = shown
            shown = held.size
        }
    }
    val rest = text(start, held.size).drop(text(start, shown).length)
    if (rest.isNotEmpty()) yield(rest)
}

/** The vector of a sentence from [count] vectors of tokens, one after the other. */
internal fun pooled(hidden: FloatArray, count: Int): FloatArray {
    val width = hidden.size / count
    val vector = DoubleArray(width) { i ->
        val column = (0 until count).map { hidden[it * width + i].toDouble() }
        when (Interface.POOLING) {
            "mean" -> column.sum() / count
            "max" -> column.fold(Double.NEGATIVE_INFINITY) { most, x -> max(most, x) }
            "cls" -> column.first()
            else -> column.last()
        }
    }
    val size = if (Interface.NORMALIZE) max(sqrt(vector.fold(0.0) { sum, x -> sum + x * x }), 1e-12) else 1.0
    return FloatArray(width) { (vector[it] / size).toFloat() }
}

/** The product of two vectors: how alike two sentences are. */
fun similarity(a: FloatArray, b: FloatArray): Float = a.indices.map { a[it] * b[it] }.sum()
