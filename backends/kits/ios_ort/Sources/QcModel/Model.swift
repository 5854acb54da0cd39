import Foundation
import OnnxRuntimeBindings

/// The model in ONNX Runtime. For one task at a time.
public final class Model {
    private let environment: ORTEnv
    private let steps: Steps
    private let text: Text?

    /// Checks the runtime's version and every file against the manifest, then loads the model.
    ///
    /// - Parameter threads: For computing; the performance cores of most phones if absent.
    public init(_ directory: URL, threads: Int32 = 2) async throws {
        try Artifact.check(directory, Steps.files, runtime: ORTVersion() ?? "0")
        environment = try ORTEnv(loggingLevel: .warning)
        steps = try Steps(directory, environment, threads: threads)
        text = Interface.hasTokenizer ? try await Text(directory) : nil
    }

    /// Runs once. Names: `Inputs` and `Outputs`.
    public func run(_ inputs: [String: ORTValue]) throws -> [String: ORTValue] {
        try steps.run(inputs)
    }

    /// Calls `onToken` with each token of the continuation, the most probable ones, until it returns false.
    public func generate(tokens: [Int], maxTokens: Int = 64, onToken: (Int) -> Bool) throws {
        precondition(Interface.task == "generate", "this model cannot generate; it can \(Interface.task)")
        precondition((1..<Interface.limit).contains(tokens.count), "expected 1 to \(Interface.limit - 1) tokens")
        guard let logits = Interface.outputs.first(where: { $0.role == "logits" }) else { return }
        var fresh = tokens
        try steps.reset()
        for _ in 0..<min(maxTokens, Interface.limit - tokens.count) {
            let token = best(try steps.feed(fresh, logits.name), width: logits.shape.last.flatMap { $0 })
            if Interface.stop.contains(token) || !onToken(token) { return }
            fresh = Interface.caches.isEmpty ? fresh + [token] : [token]
        }
    }

    /// The continuation of a text, piece by piece.
    public func generate(_ prompt: String, maxTokens: Int = 64) -> AsyncThrowingStream<String, Error> {
        stream(text) { text, onToken in
            try self.generate(tokens: text.prompt(prompt), maxTokens: maxTokens, onToken: onToken)
        }
    }

    /// The vector of a sentence; see `similarity`.
    public func embed(_ sentence: String) throws -> [Float] {
        precondition(Interface.task == "embed", "this model cannot embed; it can \(Interface.task)")
        let tokens = try need(text).sentence(sentence)
        try steps.reset()
        if let whole = Interface.outputs.first(where: { $0.role == "embedding" }) {
            return try steps.feed(tokens, whole.name)
        }
        guard let hidden = Interface.outputs.first(where: { $0.role == "hidden" }) else { return [] }
        return pooled(try steps.feed(tokens, hidden.name), tokens.count)
    }
}

/// The inputs that tell of `tokens` behind `past` others: the ids, masks, positions.
func textInputs(_ tokens: [Int], _ past: Int) throws -> [String: ORTValue] {
    var made: [String: ORTValue] = [:]
    for port in Interface.inputs where !port.role.hasPrefix("past_") {
        let numbers = numbers(of: port, tokens, past)
        let shape = port.shape.count == 1 ? [numbers.count] : [1, numbers.count]
        switch port.type {
        case "int64": made[port.name] = try tensor(numbers.map(Int64.init), .int64, shape)
        case "int32": made[port.name] = try tensor(numbers.map(Int32.init), .int32, shape)
        default: made[port.name] = try tensor(numbers.map(Float.init), .float, shape)
        }
    }
    return made
}

func numbers(of port: Interface.Port, _ tokens: [Int], _ past: Int) -> [Int] {
    switch port.role {
    case "tokens": return tokens
    case "mask": return [Int](repeating: 1, count: past + tokens.count)
    case "positions": return Array(past..<(past + tokens.count))
    default: return [Int](repeating: 0, count: tokens.count)
    }
}

func tensor<Element>(_ numbers: [Element], _ type: ORTTensorElementDataType, _ shape: [Int]) throws -> ORTValue {
    let bytes = numbers.withUnsafeBytes { Data($0) }
    let data = NSMutableData(data: bytes.isEmpty ? Data(count: 8) : bytes) // an address, for an empty cache too
    return try ORTValue(tensorData: data, elementType: type, shape: shape.map { NSNumber(value: $0) })
}

func floats(_ value: ORTValue) throws -> [Float] {
    try (value.tensorData() as Data).withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
}

/// The most probable token at the last position.
private func best(_ logits: [Float], width: Int?) -> Int {
    let last = logits.suffix(width ?? logits.count)
    return last.indices.max { last[$0] < last[$1] }.map { $0 - last.startIndex } ?? 0
}
