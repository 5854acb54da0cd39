package qc.model

import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import java.io.File

/** The tokenizer that travels with the model, read by the library of Hugging Face. */
class HuggingFaceText(directory: File) : Text {
    private val tokenizer = HuggingFaceTokenizer.builder()
        .optTokenizerPath(File(directory, "tokenizer.json").toPath())
        .optTruncation(false)
        .optPadding(false)
        .build()

    override fun encode(text: String, special: Boolean): LongArray = tokenizer.encode(text, special, false).ids

    override fun decode(tokens: LongArray): String = tokenizer.decode(tokens, true)
}
