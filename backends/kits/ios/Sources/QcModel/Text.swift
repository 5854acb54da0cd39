import Foundation
import Tokenizers

/// Text to token ids and back, by the tokenizer that travels with the model.
struct Text {
    private let tokenizer: any Tokenizer

    init(_ directory: URL) async throws {
        tokenizer = try await AutoTokenizer.from(modelFolder: directory)
    }

    /// Token ids of a text to go on with.
    func prompt(_ text: String) -> [Int] {
        let tokens = tokenizer.encode(text: text, addSpecialTokens: false)
        return (Interface.bos.map { [$0] } ?? []) + tokens
    }

    /// Token ids of a sentence, cut to what the model takes.
    func sentence(_ text: String) -> [Int] {
        let tokens = tokenizer.encode(text: text, addSpecialTokens: true)
        guard let last = tokens.last, tokens.count > Interface.limit else { return tokens }
        return tokens.prefix(Interface.limit - 1) + [last]
    }

    func decode(_ tokens: ArraySlice<Int>) -> String {
        tokens.isEmpty ? "" : tokenizer.decode(tokens: Array(tokens), skipSpecialTokens: true)
    }
}

/// The text of tokens piece by piece, each piece complete characters. A token's text depends on its neighbours, so new is
/// what the last piece with the token has more than without it.
struct Pieces {
    private let text: Text
    private var held: [Int] = []
    private var start = 0
    private var shown = 0

    init(_ text: Text) { self.text = text }

    /// The new piece that a token completes, or nil.
    mutating func add(_ token: Int) -> String? {
        held.append(token)
        let before = text.decode(held[start..<shown])
        let after = text.decode(held[start...])
        guard after.count > before.count, !after.hasSuffix("\u{FFFD}") else { return nil }
        start = shown
        shown = held.count
        return String(after.dropFirst(before.count))
    }

    /// What is left at the end.
    func rest() -> String {
        String(text.decode(held[start...]).dropFirst(text.decode(held[start..<shown]).count))
    }
}

/// The tokenizer, or an error if the model travels without.
func need(_ text: Text?) throws -> Text {
    guard let text else {
        throw ArtifactError(file: "tokenizer.json", reason: "the model was compiled without one: it takes token ids")
    }
    return text
}

/// The text of the tokens that `produce` calls its last argument with, until that returns false; piece by piece.
func stream(
    _ text: Text?, _ produce: @escaping (Text, (Int) -> Bool) throws -> Void
) -> AsyncThrowingStream<String, Error> {
    AsyncThrowingStream { continuation in
        let work = Task.detached {
            do {
                let text = try need(text)
                var pieces = Pieces(text)
                try produce(text) { token in
                    if let piece = pieces.add(token) { continuation.yield(piece) }
                    return !Task.isCancelled
                }
                continuation.yield(pieces.rest())
                continuation.finish()
            } catch {
                continuation.finish(throwing: error)
            }
        }
        continuation.onTermination = { _ in work.cancel() }
    }
}

/// The vector of a sentence from `count` vectors of tokens, one after the other.
func pooled(_ hidden: [Float], _ count: Int) -> [Float] {
    let width = hidden.count / count
    let vector: [Double] = (0..<width).map { i in
        let column = (0..<count).map { Double(hidden[$0 * width + i]) }
        switch Interface.pooling {
        case "mean": return column.reduce(0, +) / Double(count)
        case "max": return column.max() ?? 0
        case "cls": return column.first ?? 0
        default: return column.last ?? 0
        }
    }
    let length = vector.reduce(0) { $0 + $1 * $1 }.squareRoot()
    let size = Interface.normalize ? max(length, 1e-12) : 1
    return vector.map { Float($0 / size) }
}

/// The product of two vectors: how alike two sentences are.
public func similarity(_ a: [Float], _ b: [Float]) -> Float {
    zip(a, b).reduce(0) { $0 + $1.0 * $1.1 }
}
